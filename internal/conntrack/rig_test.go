package conntrack

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// rig is a node whose pods' packets a rule of netfilter masquerades.
type rig struct {
	*lab.Topology
	t       *testing.T
	backend string // nft or legacy
}

// eachBackend runs a test with the rules of both kinds of iptables.
func eachBackend(t *testing.T, test func(*testing.T, *rig)) {
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			r := &rig{labtest.NewNode(t, lab.Options{Pods: 2}), t, backend}
			for _, tool := range r.tools() {
				labtest.Tool(t, tool)
				// A connection that was picked up wrongly is INVALID at once.
				r.iptables(tool, "-t", "mangle", "-A", "PREROUTING", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
			}
			r.masquerade(true)
			for _, key := range []string{"acct", "timestamp"} {
				if err := r.Node.Sysctl("net.netfilter.nf_conntrack_"+key, "1"); err != nil {
					t.Fatal(err)
				}
			}
			test(t, r)
		})
	}
}

func (r *rig) tools() []string { return []string{"iptables-" + r.backend, "ip6tables-" + r.backend} }

func (r *rig) iptables(tool string, args ...string) {
	r.t.Helper()
	// The lock of iptables is one for all namespaces, and somebody else may have it.
	ctx, cancel := context.WithTimeout(r.t.Context(), labtest.Patience(time.Minute))
	defer cancel()
	if out, err := r.Node.Run(ctx, tool, append([]string{"-w"}, args...)...); err != nil {
		r.t.Fatalf("%v\n%s", err, out)
	}
}

// masquerade adds or removes the rule. The chain, and with it the hook, stays.
func (r *rig) masquerade(on bool) {
	r.t.Helper()
	do := map[bool]string{true: "-A", false: "-D"}[on]
	for i, source := range []netip.Prefix{lab.PodRange4, lab.PodRange6} {
		r.iptables(r.tools()[i], "-t", "nat", do, "POSTROUTING", "-o", "eth0", "-s", source.String(), "-j", "MASQUERADE")
	}
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience(10*time.Second))
	t.Cleanup(cancel)
	return ctx
}

func (r *rig) list(filter Filter) (flows []Flow) {
	r.t.Helper()
	err := r.Node.Do(func() (err error) {
		flows, err = List(r.t.Context(), filter)
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return flows
}

// find returns the only listed connection between the two.
func (r *rig) find(proto uint8, src, dst netip.AddrPort) Flow {
	r.t.Helper()
	var found []Flow
	for _, f := range r.list(Filter{}) {
		if f.Proto == proto && f.Src == src && f.Dst == dst {
			found = append(found, f)
		}
	}
	if len(found) != 1 {
		r.t.Fatalf("%d connections of protocol %d from %s to %s", len(found), proto, src, dst)
	}
	return found[0]
}

func (r *rig) create(flows ...Flow) (n int, err error) {
	err = r.Node.Do(func() (err error) {
		n, err = Create(r.t.Context(), flows)
		return err
	})
	return n, err
}

func (r *rig) remove(flows ...Flow) (n int) {
	r.t.Helper()
	err := r.Node.Do(func() (err error) {
		n, err = Delete(r.t.Context(), flows)
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return n
}

// mustCreate makes the connections, and fails the test if one was not.
func (r *rig) mustCreate(flows ...Flow) {
	r.t.Helper()
	if n, err := r.create(flows...); err != nil || n != len(flows) {
		r.t.Fatalf("%d of %d created: %v", n, len(flows), err)
	}
}

// families calls test for the pod and the world of each family.
func (r *rig) families(test func(t *testing.T, pod, world, node netip.Addr)) {
	t := r.t
	defer func() { r.t = t }()
	for _, world := range r.WorldAddr.All() {
		t.Run(fmt.Sprintf("IPv%d", map[bool]int{true: 4, false: 6}[world.Is4()]), func(sub *testing.T) {
			r.t = sub
			test(sub, r.PodAddrs[0].Of(world), world, r.NodeAddr.Of(world))
		})
	}
}

// connection is a TCP connection of the first pod, with both of its ends.
type connection struct {
	pod, world *net.TCPConn
}

func (r *rig) connect(pod, world netip.Addr) connection {
	r.t.Helper()
	l, err := lab.ListenTCP(r.World, netip.AddrPortFrom(world, 0))
	if err != nil {
		r.t.Fatal(err)
	}
	defer l.Close()
	c, err := lab.DialTCP(within(r.t), r.Pods[0], netip.AddrPortFrom(pod, 0), l.Addr().(*net.TCPAddr).AddrPort())
	if err != nil {
		r.t.Fatal(err)
	}
	l.SetDeadline(time.Now().Add(labtest.Patience(10 * time.Second)))
	peer, err := l.AcceptTCP()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		c.Close()
		peer.Close()
	})
	return connection{c, peer}
}

func local(c net.Conn) netip.AddrPort {
	a := netip.MustParseAddrPort(c.LocalAddr().String())
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// pass sends n bytes from one end to the other.
func pass(t *testing.T, from, to *net.TCPConn, n int) {
	t.Helper()
	deadline := time.Now().Add(labtest.Patience(10 * time.Second))
	from.SetDeadline(deadline)
	to.SetDeadline(deadline)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(from, lab.Content(1, int64(n)))
		sent <- err
	}()
	got, err := io.CopyN(io.Discard, to, int64(n))
	if err != nil {
		t.Fatalf("%d of %d bytes arrived: %v", got, n, err)
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
}

// retransmits counts the segments that an end has sent twice.
func retransmits(t *testing.T, c *net.TCPConn) (n uint32) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		var info *unix.TCPInfo
		if info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			n = info.Total_retrans
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}
