package e2e_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience(d))
	t.Cleanup(cancel)
	return ctx
}

// server starts a server of package lab for the rest of the test and returns
// where it listens.
func server(t testing.TB, start func(*lab.NS, netip.AddrPort) (*lab.Server, error), ns *lab.NS, local netip.AddrPort) netip.AddrPort {
	t.Helper()
	s, err := start(ns, local)
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, s.Close)
	return s.Addr
}

func anyPort(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, 0) }

func family(a netip.Addr) string {
	if a.Is4() {
		return "v4"
	}
	return "v6"
}

// wire watches what the node sends out of a device.
type wire struct {
	capture *lab.Capture
	leaks   *lab.Counter
	mu      sync.Mutex
	first   []string // the first leaks
}

// isPod tells whether an address belongs to a pod of the node.
func isPod(a netip.Addr) bool { return lab.PodRange4.Contains(a) || lab.PodRange6.Contains(a) }

// watchWire begins to look for pod addresses that leave the node in an IP header,
// or in the packet quoted by an ICMP error, except towards the allowed addresses.
func (n *node) watchWire(allowed ...netip.Addr) *wire {
	n.t.Helper()
	return n.watchDevice("eth0", allowed...)
}

// watchDevice is watchWire of any device.
func (n *node) watchDevice(dev string, allowed ...netip.Addr) *wire {
	n.t.Helper()
	w := &wire{capture: labtest.Capture(n.t, n.Node, dev, lab.CaptureOptions{MaxPackets: 1, SnapLen: 64})}
	ok := make(map[netip.Addr]bool)
	for _, a := range allowed {
		ok[a] = true
	}
	w.leaks = w.capture.Count(func(p lab.Packet) bool {
		if !p.Outgoing {
			return false
		}
		f, parsed := lab.ParseFrame(p.Data)
		if !parsed || ok[f.Dst] || !isPod(f.Src) && !quotesPod(f) {
			return false
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if len(w.first) < 5 {
			w.first = append(w.first, fmt.Sprintf("%s % x", f, p.Data[:min(len(p.Data), 96)]))
		}
		return true
	})
	return w
}

// quotesPod tells whether an ICMP error shows the address of a pod.
func quotesPod(f lab.Frame) bool {
	typ, _, body, ok := f.ICMP()
	if !ok {
		return false
	}
	isError := typ == 3 || typ == 11 || typ == 12
	if f.Src.Is6() {
		isError = typ < 128
	}
	q, parsed := lab.ParseIP(body)
	return isError && parsed && (isPod(q.Dst) || isPod(q.Src))
}

// check fails the test if a pod address was on the wire, or if the capture can't know.
func (w *wire) check(t testing.TB) {
	t.Helper()
	leaks, lost := w.leaks.N(), w.capture.Lost()
	w.mu.Lock()
	defer w.mu.Unlock()
	if leaks > 0 {
		t.Errorf("%d packets left the node with a pod's address; the first:\n%s", leaks, strings.Join(w.first, "\n"))
	}
	if lost > 0 {
		t.Errorf("the capture lost %d packets: it proves nothing", lost)
	}
}

// counts are the packets by outcome since the data plane was made.
func (n *node) counts() map[string]uint64 {
	n.t.Helper()
	in, err := datapath.Inspect(n.bpfRoot)
	if err != nil {
		n.t.Fatal(err)
	}
	defer in.Close()
	list, err := in.Counts()
	if err != nil {
		n.t.Fatal(err)
	}
	m := make(map[string]uint64)
	for _, c := range list {
		m[c.Outcome.String()] += c.Packets
	}
	return m
}

// transfer sends n bytes through an echo server and compares the hash of what
// comes back: both directions are busy at once.
func transfer(ctx context.Context, ns *lab.NS, echo netip.AddrPort, n int64) (seen netip.AddrPort, err error) {
	seen, c, err := lab.AskTCP(ctx, ns, netip.AddrPort{}, echo)
	if err != nil {
		return seen, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	sent, got := sha256.New(), sha256.New()
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, io.TeeReader(lab.Content(uint64(n), n), sent))
		wrote <- errors.Join(err, c.CloseWrite())
	}()
	back, err := io.Copy(got, c)
	if err = errors.Join(err, <-wrote); err != nil {
		return seen, fmt.Errorf("after %d bytes: %w", back, err)
	}
	if back != n || string(got.Sum(nil)) != string(sent.Sum(nil)) {
		return seen, fmt.Errorf("%d of %d bytes came back, or altered", back, n)
	}
	return seen, nil
}

// exchange sends a few bytes over a connection to an echo server and waits for them.
func exchange(c net.Conn) error {
	c.SetDeadline(time.Now().Add(10 * time.Second))
	const text = "still here"
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	buf := make([]byte, len(text))
	if _, err := io.ReadFull(c, buf); err != nil {
		return err
	}
	if string(buf) != text {
		return fmt.Errorf("echo %q", buf)
	}
	return nil
}

// The watch on the wire sees what it is for: without an agent everything leaks.
func TestWireSeesLeaks(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{})
	for _, dst := range n.WorldAddr.All() {
		pod, host := n.PodAddrs[0].Of(dst), n.NodeAddr.Of(dst)
		asked := packet.Packet{Link: packet.Raw, Src: dst, Dst: pod, Proto: packet.UDP, SrcPort: 53, DstPort: 40000}
		unreachable := uint8(3)
		if dst.Is6() {
			unreachable = 1
		}
		for _, c := range []struct {
			name string
			from *lab.NS
			p    packet.Packet
			want int
		}{
			{"a datagram of a pod", n.Pods[0], asked.Reply(), 1},
			{"an error of the node that quotes one to a pod", n.Node, asked.Error(host, unreachable, 3, -1), 1},
			{"a datagram of the node", n.Node, asked.Reply().From(host, 40000), 0},
			{"an error of the node about its own", n.Node, asked.To(host, 40000).Error(host, unreachable, 3, -1), 0},
		} {
			wire := n.watchWire()
			left := wire.capture.Count(func(p lab.Packet) bool {
				f, ok := lab.ParseFrame(p.Data)
				return ok && p.Outgoing && f.Dst == dst
			})
			if err := newRawSender(t, c.from).send(c.p.Build()); err != nil {
				t.Fatal(err)
			}
			labtest.Eventually(t, 5*time.Second, func() error {
				if left.N() == 0 {
					return fmt.Errorf("%s %s: not on the wire", c.name, family(dst))
				}
				return nil
			})
			if got := wire.leaks.N(); got != c.want {
				t.Errorf("%s %s: %d leaks, want %d", c.name, family(dst), got, c.want)
			}
			wire.capture.Stop()
		}
	}
}
