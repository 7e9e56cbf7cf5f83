package conntrack

import (
	"errors"
	"io"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// Under traffic, an entry is replaced again and again by one that says the same.
func TestReplaceUnderTraffic(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			c := r.connect(pod, world)
			f := r.find(unix.IPPROTO_TCP, local(c.pod), local(c.world))
			r.masquerade(false)
			defer r.masquerade(true)
			// A segment that comes between would be answered by the node, with a RST: whoever replaces
			// holds the answers back.
			tool := r.tools()[map[bool]int{true: 0, false: 1}[world.Is4()]]
			r.iptables(tool, "-A", "INPUT", "-i", "eth0", "-p", "tcp", "-j", "DROP")
			const size = 64 << 20
			done := make(chan error, 2)
			c.pod.SetDeadline(time.Now().Add(labtest.Patience(60 * time.Second)))
			c.world.SetDeadline(time.Now().Add(labtest.Patience(60 * time.Second)))
			go func() {
				_, err := io.Copy(c.pod, lab.Content(1, size))
				done <- err
			}()
			go func() {
				_, err := io.CopyN(io.Discard, c.world, size)
				done <- err
			}()
			err := r.Node.Do(func() error {
				for n := 0; n < 200 && len(done) == 0; n++ {
					if m, err := Replace(t.Context(), []Flow{described(f)}); m != 1 || err != nil {
						return err
					}
				}
				return nil
			})
			if err := errors.Join(err, <-done, <-done); err != nil {
				t.Fatal(err)
			}
			if got := r.find(f.Proto, f.Src, f.Dst); got.Xlate != f.Xlate || !got.SNAT {
				t.Errorf("%+v", got)
			}
		})
	})
}

func TestReplace(t *testing.T) {
	eachBackend(t, func(t *testing.T, r *rig) {
		r.families(func(t *testing.T, pod, world, node netip.Addr) {
			f := Flow{
				Proto: unix.IPPROTO_UDP, Src: netip.AddrPortFrom(pod, 1111), Dst: netip.AddrPortFrom(world, 2222),
				Xlate: netip.AddrPortFrom(node, 3333), State: TwoWay,
			}
			taken := f
			taken.Src = netip.AddrPortFrom(r.PodAddrs[1].Of(world), 1111)
			plain := f
			plain.Xlate = f.Src
			var n int
			err := r.Node.Do(func() (err error) {
				n, err = Replace(t.Context(), []Flow{plain, f, plain, f, taken})
				return err
			})
			if n != 4 || !errors.Is(err, unix.EEXIST) {
				t.Errorf("%d replaced, %v", n, err)
			}
			if got := r.find(f.Proto, f.Src, f.Dst); got.Xlate != f.Xlate || !got.SNAT {
				t.Errorf("%+v", got)
			}
		})
	})
}
