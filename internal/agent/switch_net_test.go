package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// switchNode is a node with the real programs and real rules, between which the
// connections of its pods are switched.
type switchNode struct {
	*lab.Topology
	t       *testing.T
	d       *datapath.Datapath
	in      policy.Input
	backend string
	ruling  bool
}

func newSwitchNode(t *testing.T, backend string) *switchNode {
	n := &switchNode{Topology: labtest.NewNode(t, lab.Options{Pods: 2}), t: t, backend: backend}
	for _, tool := range n.tools() {
		labtest.Tool(t, tool)
	}
	index, err := n.Node.Index("eth0")
	if err != nil {
		t.Fatal(err)
	}
	n.in = policy.Input{
		IPv4: true, IPv6: true,
		Sources:   []policy.Rule{{Prefix: lab.PodRange4}, {Prefix: lab.PodRange6}},
		HostAddrs: append(n.NodeAddr.All(), n.PodGateway.All()...),
		Devices:   []policy.Device{{Name: "eth0", Index: index, Ethernet: true, IPv4: n.NodeAddr.V4, IPv6: n.NodeAddr.V6}},
	}
	for port := 32768; port < 65536; port++ {
		n.in.Ports = append(n.in.Ports, uint16(port))
	}
	root := filepath.Join(labtest.BPFFS(t), "bauta")
	n.do(func() (err error) {
		n.d, err = datapath.Open(datapath.Options{Root: root, DefaultFlows: 65536, AllowPrivateBPFFS: true})
		return err
	})
	t.Cleanup(func() { n.do(n.d.Close) })
	return n
}

func (n *switchNode) do(f func() error) {
	n.t.Helper()
	if err := n.Node.Do(f); err != nil {
		n.t.Fatal(err)
	}
}

func (n *switchNode) tools() []string {
	return []string{"iptables-" + n.backend, "ip6tables-" + n.backend}
}

func (n *switchNode) iptables(ctx context.Context, args ...string) error {
	for i, pods := range []netip.Prefix{lab.PodRange4, lab.PodRange6} {
		if out, err := n.Node.Run(ctx, n.tools()[i], append(append([]string{"-w"}, args...), "-s", pods.String())...); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
	}
	return nil
}

var masqueradeRule = []string{"POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"}

// netRules are the rules, netPrograms the programs of the node.
type (
	netRules    struct{ *switchNode }
	netPrograms struct{ *switchNode }
	netTracked  struct{ *switchNode }
)

func (n netRules) Ready(ctx context.Context) error {
	guard := []string{"POSTROUTING", "-o", "eth0", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"}
	if n.iptables(ctx, append([]string{"-t", "mangle", "-C"}, guard...)...) != nil {
		if err := n.iptables(ctx, append([]string{"-t", "mangle", "-A"}, guard...)...); err != nil {
			return err
		}
		// The NAT hook has to be there, with no rule that says anything.
		return n.iptables(ctx, "-t", "nat", "-A", "POSTROUTING", "-o", "eth0")
	}
	if !n.ruling {
		return nil
	}
	n.ruling = false
	return n.iptables(ctx, append([]string{"-t", "nat", "-D"}, masqueradeRule...)...)
}

func (n netRules) Start(ctx context.Context) error {
	n.ruling = true
	return n.iptables(ctx, append([]string{"-t", "nat", "-A"}, masqueradeRule...)...)
}

func (n netPrograms) apply(ctx context.Context, devices []policy.Device) error {
	in := n.in
	in.Devices = devices
	p, err := policy.Build(in)
	if err != nil {
		return err
	}
	return n.Node.Do(func() error { return n.d.Apply(ctx, p) })
}

func (n netPrograms) Ready(ctx context.Context) error { return n.apply(ctx, nil) }
func (n netPrograms) Start(ctx context.Context) error { return n.apply(ctx, n.in.Devices) }

func (n netTracked) List(ctx context.Context, f conntrack.Filter) (out []conntrack.Flow, err error) {
	err = n.Node.Do(func() (err error) { out, err = conntrack.List(ctx, f); return err })
	return out, err
}

func (n netTracked) Create(ctx context.Context, flows []conntrack.Flow) (m int, err error) {
	err = n.Node.Do(func() (err error) { m, err = conntrack.Create(ctx, flows); return err })
	return m, err
}

func (n netTracked) Replace(ctx context.Context, flows []conntrack.Flow) (m int, err error) {
	err = n.Node.Do(func() (err error) { m, err = conntrack.Replace(ctx, flows); return err })
	return m, err
}

func (n netTracked) Delete(ctx context.Context, flows []conntrack.Flow) (m int, err error) {
	err = n.Node.Do(func() (err error) { m, err = conntrack.Delete(ctx, flows); return err })
	return m, err
}

func (n *switchNode) modeSwitch() *modeSwitch {
	return &modeSwitch{
		maps: n.d, tracked: netTracked{n}, programs: netPrograms{n}, rules: netRules{n},
		sources: []netip.Prefix{lab.PodRange4, lab.PodRange6},
	}
}

// talks are conversations that go on until the test stops them.
type talks struct {
	t     *testing.T
	stop  chan struct{}
	done  sync.WaitGroup
	count []*atomic.Int64
}

// start repeats say until stop.
func (k *talks) start(name string, say func() error) {
	n := new(atomic.Int64)
	k.count = append(k.count, n)
	k.done.Go(func() {
		for {
			select {
			case <-k.stop:
				return
			default:
			}
			if err := say(); err != nil {
				k.t.Errorf("%s after %d times: %v", name, n.Load(), err)
				return
			}
			n.Add(1)
		}
	})
}

// progress waits until each has said something twice more.
func (k *talks) progress() {
	k.t.Helper()
	var before []int64
	for _, n := range k.count {
		before = append(before, n.Load())
	}
	labtest.Eventually(k.t, 30*time.Second, func() error {
		for i, n := range k.count {
			if n.Load() < before[i]+2 {
				return fmt.Errorf("conversation %d is silent", i)
			}
		}
		return nil
	})
}

func (n *switchNode) talkTCP(k *talks, i int, pod int, server netip.AddrPort) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), labtest.Patience(20*time.Second))
	defer cancel()
	// Pods with one source port get different external ones.
	local := netip.AddrPortFrom(n.PodAddrs[pod].Of(server.Addr()), uint16(45000+i))
	_, c, err := lab.AskTCP(ctx, n.Pods[pod], local, server)
	if err != nil {
		n.t.Fatal(err)
	}
	labtest.Close(n.t, c.Close)
	r := bufio.NewReader(c)
	k.start(fmt.Sprintf("TCP %s", local), func() error {
		c.SetDeadline(time.Now().Add(labtest.Patience(20 * time.Second)))
		text := fmt.Sprintf("%s %d\n", local, time.Now().UnixNano())
		if _, err := c.Write([]byte(text)); err != nil {
			return err
		}
		line, err := r.ReadString('\n')
		if err == nil && line != text {
			err = fmt.Errorf("%q came back", line)
		}
		return err
	})
}

func (n *switchNode) talkUDP(k *talks, i int, pod int, server netip.AddrPort) {
	n.t.Helper()
	local := netip.AddrPortFrom(n.PodAddrs[pod].Of(server.Addr()), uint16(46000+i))
	c, err := lab.DialUDP(n.t.Context(), n.Pods[pod], local, server)
	if err != nil {
		n.t.Fatal(err)
	}
	labtest.Close(n.t, c.Close)
	var seen netip.AddrPort
	k.start(fmt.Sprintf("UDP %s", local), func() error {
		// One that was lost is sent again: the answers may be held.
		now, err := n.ask(c)
		if err == nil && seen.IsValid() && now != seen {
			err = fmt.Errorf("seen as %s, before as %s", now, seen)
		}
		seen = now
		return err
	})
}

func (n *switchNode) ask(c *net.UDPConn) (netip.AddrPort, error) {
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Patience(20*time.Second))
	defer cancel()
	return lab.AskUDPOn(ctx, c, []byte("x"))
}

// Connections that talk all the time go to the rules and back again, twice: each keeps its
// socket, nobody sees another source, and nothing leaves untranslated.
func TestSwitchUnderTraffic(t *testing.T) {
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			n := newSwitchNode(t, backend)
			s := n.modeSwitch()
			ctx := t.Context()
			if err := s.programs.Start(ctx); err != nil {
				t.Fatal(err)
			}
			wire := labtest.Capture(t, n.World, "eth0", lab.CaptureOptions{MaxPackets: 1})
			leaks := wire.Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
			k := &talks{t: t, stop: make(chan struct{})}
			const each = 8
			for _, world := range n.WorldAddr.All() {
				tcp, err := lab.EchoTCP(n.World, netip.AddrPortFrom(world, 0))
				if err != nil {
					t.Fatal(err)
				}
				labtest.Close(t, tcp.Close)
				udp, err := lab.EchoUDP(n.World, netip.AddrPortFrom(world, 0))
				if err != nil {
					t.Fatal(err)
				}
				labtest.Close(t, udp.Close)
				for i := range each {
					for pod := range n.Pods {
						n.talkTCP(k, i, pod, tcp.Addr)
						n.talkUDP(k, i, pod, udp.Addr)
					}
				}
			}
			stop := sync.OnceFunc(func() { close(k.stop); k.done.Wait() })
			defer stop()
			const flows = 2 * 2 * 2 * each
			k.progress()
			for range 2 {
				out, err := s.toRules(ctx)
				if err != nil || out != (switched{Moved: flows}) {
					t.Fatalf("to the rules: %+v, %v", out, err)
				}
				k.progress()
				if left, err := n.d.Flows(ctx); err != nil || len(left) != 0 {
					t.Errorf("mappings: %v, %v", left, err)
				}
				out, err = s.toPrograms(ctx)
				if err = errors.Join(err, s.finish()); err != nil || out != (switched{Moved: flows}) {
					t.Fatalf("to the programs: %+v, %v", out, err)
				}
				k.progress()
			}
			stop()
			if leaked := leaks.N(); leaked != 0 {
				t.Errorf("%d packets left untranslated", leaked)
			}
		})
	}
}

// Connections that are made while the mode changes, one after the other, all succeed.
func TestSwitchUnderStorm(t *testing.T) {
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			n := newSwitchNode(t, backend)
			s := n.modeSwitch()
			ctx := t.Context()
			if err := s.programs.Start(ctx); err != nil {
				t.Fatal(err)
			}
			wire := labtest.Capture(t, n.World, "eth0", lab.CaptureOptions{MaxPackets: 1})
			leaks := wire.Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
			k := &talks{t: t, stop: make(chan struct{})}
			for _, world := range n.WorldAddr.All() {
				tcp, err := lab.EchoTCP(n.World, netip.AddrPortFrom(world, 0))
				if err != nil {
					t.Fatal(err)
				}
				labtest.Close(t, tcp.Close)
				for pod := range n.Pods {
					k.start(fmt.Sprintf("pod %d to %s", pod, tcp.Addr), func() error { return n.connect(pod, tcp.Addr) })
				}
			}
			stop := sync.OnceFunc(func() { close(k.stop); k.done.Wait() })
			defer stop()
			k.progress()
			for range 2 {
				// What netfilter begins on a port of a mapping that is just being moved has to stay with
				// the programs: a few of thousands.
				out, err := s.toRules(ctx)
				if err != nil || out.Left > max(out.Moved/20, 20) {
					t.Fatalf("to the rules: %+v, %v", out, err)
				}
				t.Logf("to the rules: %+v", out)
				k.progress()
				out, err = s.toPrograms(ctx)
				if err != nil || out.Left > max(out.Moved/20, 20) || s.finish() != nil {
					t.Fatalf("to the programs: %+v, %v", out, err)
				}
				t.Logf("to the programs: %+v", out)
				k.progress()
			}
			stop()
			if leaked := leaks.N(); leaked != 0 {
				t.Errorf("%d packets left untranslated", leaked)
			}
		})
	}
}

// connect is a short connection of a pod.
func (n *switchNode) connect(pod int, server netip.AddrPort) error {
	// Ports of closed connections wait for minutes: there must be enough of them.
	time.Sleep(10 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Patience(20*time.Second))
	defer cancel()
	seen, c, err := lab.AskTCP(ctx, n.Pods[pod], netip.AddrPort{}, server)
	if err != nil {
		return err
	}
	if seen.Addr() != n.NodeAddr.Of(server.Addr()) {
		err = fmt.Errorf("seen as %s", seen)
	}
	return errors.Join(err, c.Close())
}
