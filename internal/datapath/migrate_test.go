package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// chatter keeps flows of a pod busy: TCP connections that are open all the time, UDP
// sockets that must be seen from the same port all the time, and one new connection
// after the other.
type chatter struct {
	t      *testing.T
	rounds atomic.Int64
	opened atomic.Int64
	cancel context.CancelFunc
	group  sync.WaitGroup

	mu   sync.Mutex
	lost []error
}

func chat(t *testing.T, topo *lab.Topology, each int) *chatter {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &chatter{t: t, cancel: cancel}
	t.Cleanup(c.end)
	for _, world := range topo.WorldAddr.All() {
		tcp, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(world, 0))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, tcp.Close)
		udp, err := lab.EchoUDP(topo.World, netip.AddrPortFrom(world, 0))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, udp.Close)
		for range each {
			_, conn, err := lab.AskTCP(within(t, 10*time.Second), topo.Pods[0], netip.AddrPort{}, tcp.Addr)
			if err != nil {
				t.Fatal(err)
			}
			c.group.Go(func() { defer conn.Close(); c.keep(ctx, func() error { return echo(conn) }) })
			c.talkUDP(ctx, topo, udp.Addr)
		}
		c.group.Go(func() {
			c.keep(ctx, func() error {
				ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
				defer cancel()
				_, conn, err := lab.AskTCP(ctx, topo.Pods[0], netip.AddrPort{}, tcp.Addr)
				if err != nil {
					return fmt.Errorf("new connection: %w", err)
				}
				c.opened.Add(1)
				return conn.Close()
			})
		})
	}
	return c
}

func (c *chatter) talkUDP(ctx context.Context, topo *lab.Topology, server netip.AddrPort) {
	c.t.Helper()
	conn, err := lab.DialUDP(ctx, topo.Pods[0], netip.AddrPort{}, server)
	if err != nil {
		c.t.Fatal(err)
	}
	first, err := lab.AskUDPOn(within(c.t, 5*time.Second), conn, []byte("hello"))
	if err != nil {
		c.t.Fatal(err)
	}
	c.group.Go(func() {
		defer conn.Close()
		c.keep(ctx, func() error {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			seen, err := lab.AskUDPOn(ctx, conn, []byte("hello"))
			if err == nil && seen != first {
				err = fmt.Errorf("UDP from %s: seen as %s, was %s", conn.LocalAddr(), seen, first)
			}
			return err
		})
	})
}

func (c *chatter) keep(ctx context.Context, exchange func() error) {
	for ctx.Err() == nil {
		if err := exchange(); err != nil {
			if ctx.Err() == nil {
				c.mu.Lock()
				c.lost = append(c.lost, err)
				c.mu.Unlock()
			}
			return
		}
		c.rounds.Add(1)
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (c *chatter) end() {
	c.cancel()
	c.group.Wait()
}

// goesOn waits for some more exchanges, and fails if a flow was lost.
func (c *chatter) goesOn(when string) {
	c.t.Helper()
	rounds, opened := c.rounds.Load()+100, c.opened.Load()+4
	labtest.Eventually(c.t, 20*time.Second, func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.lost) > 0 {
			c.t.Fatalf("%s: %v", when, errors.Join(c.lost...))
		}
		if r, o := c.rounds.Load(), c.opened.Load(); r < rounds || o < opened {
			return fmt.Errorf("%s: %d exchanges and %d new connections missing", when, rounds-r, opened-o)
		}
		return nil
	})
}

func echo(conn net.Conn) error {
	buf := make([]byte, 100)
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write(buf); err != nil {
		return err
	}
	for n := 0; n < len(buf); {
		m, err := conn.Read(buf[n:])
		if err != nil {
			return err
		}
		n += m
	}
	return nil
}

// mover is a data plane in use, to be migrated.
type mover struct {
	*bench
	topo  *lab.Topology
	in    policy.Input
	chat  *chatter
	leaks *lab.Counter
	chain [2]string // of eth0 and eth1
}

// moverFlows are enough for all connections that a test opens.
const moverFlows = 16384

// checkMigrated expects a data plane without anything left of the migration, and that
// no flow has got another mapping.
func (m *mover) checkMigrated(when string, flows uint32) {
	m.t.Helper()
	m.chat.goesOn(when)
	if n := m.leaks.N(); n != 0 {
		m.t.Fatalf("%s: %d packets left untranslated", when, n)
	}
	for i, dev := range []string{"eth0", "eth1"} {
		if got := chain(m.t, m.topo.Node, dev); got != m.chain[i] {
			m.t.Errorf("%s: on %s:\n%swant\n%s", when, dev, got, m.chain[i])
		}
	}
	for _, name := range []string{nextDir, pinControl + newSuffix} {
		if _, err := os.Stat(filepath.Join(m.opt.Root, name)); !os.IsNotExist(err) {
			m.t.Errorf("%s: %s: %v", when, name, err)
		}
	}
	for _, name := range []string{pinForward4, pinReverse6} {
		pinned, err := pinnedFlows(m.opt.Root)
		if err != nil || pinned != flows || m.objs.byName()[name].MaxEntries() != flows {
			m.t.Errorf("%s: %d flows, want %d, %v", when, pinned, flows, err)
		}
	}
	if got := m.attachments(); len(got) != 2 || got[0].Draining || got[1].Draining {
		m.t.Errorf("%s: attached %+v", when, got)
	}
}

func twoUplinks(t *testing.T) *lab.Topology {
	t.Helper()
	return labtest.NewNode(t, lab.Options{SecondUplink: true})
}

func newMover(t *testing.T, without []Feature) *mover {
	t.Helper()
	topo := twoUplinks(t)
	m := &mover{topo: topo, in: nodePolicy2(t, topo)}
	m.bench = newBench(t, topo.Node, Options{Without: without, DefaultFlows: moverFlows})
	m.apply(m.in)
	m.watch(t)
	return m
}

// watch begins the traffic.
func (m *mover) watch(t *testing.T) {
	t.Helper()
	m.leaks = labtest.Capture(t, m.topo.World, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1, SnapLen: 64}).
		Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
	m.chain = [2]string{chain(t, m.topo.Node, "eth0"), chain(t, m.topo.Node, "eth1")}
	m.chat = chat(t, m.topo, 5)
	m.chat.goesOn("before")
}

// Another size of the tables: no connection is lost, no flow gets another port, and
// nothing leaves untranslated. What does not fit is refused before anything happens.
func TestMigrateSize(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, _ Hook) {
		m := newMover(t, without)
		for _, flows := range []uint32{4 * moverFlows, moverFlows / 2} {
			before, _ := m.entries()
			m.close()
			m.opt.Flows = flows
			m.open()
			m.checkMigrated(fmt.Sprint(flows), flows)
			m.checkSame(before)
			m.apply(m.in)
			m.chat.goesOn("after Apply")
			if s := m.sweep(); s.Orphans+s.Vanished != 0 {
				t.Errorf("%+v", s)
			}
		}
		m.chat.end()
		m.checkBijection(ports(32768, 32768))
		m.chat = chat(t, m.topo, 1)
		m.close()
		tooSmall := m.opt
		tooSmall.Flows = 16
		if err := m.tryOpen(tooSmall); err == nil || !strings.Contains(hints(err), "bpf-nat-global-max to ") {
			t.Errorf("16 flows: %v", err)
		}
		m.open()
		m.checkMigrated("refused", moverFlows/2)
	})
}

// A migration ends at each of its steps, as by a crash. The data plane goes on
// working, and the next agent completes the migration or begins anew, whether it
// wants the same size or the old one.
func TestMigrateStoppedHalfWay(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, _ Hook) {
		m := newMover(t, without)
		sizes := [2]uint32{moverFlows, 2 * moverFlows}
		var steps []string
		m.close()
		m.opt.Flows, m.opt.interrupt = sizes[1], func(step string) error { steps = append(steps, step); return nil }
		m.open()
		m.checkMigrated("complete", sizes[1])
		if len(steps) < 20 || !slices.Contains(steps, "commit") || !slices.Contains(steps, "discard") {
			t.Fatalf("steps %q", steps)
		}
		var stops []int
		for i, step := range steps {
			if !strings.HasPrefix(step, "pin ") || step == "pin "+pinForward6 || step == "pin "+pinControl { // one is like the other
				stops = append(stops, i)
			}
		}
		for _, i := range labtest.Thin(t, "stops", stops) {
			step := steps[i]
			at, from := 0, sizes[(i+1)%2]
			m.close()
			m.opt.Flows = sizes[0] + sizes[1] - m.pinned()
			m.opt.interrupt = func(string) error {
				if at++; at > i {
					return errStopped
				}
				return nil
			}
			if err := m.tryOpen(m.opt); !errors.Is(err, errStopped) {
				t.Fatalf("%s: %v", step, err)
			}
			m.chat.goesOn("stopped before " + step)
			if i%3 == 0 { // the operator thinks better of it
				m.opt.Flows = from
			}
			m.opt.interrupt = nil
			m.open()
			m.checkMigrated("after a stop before "+step, m.opt.Flows)
			m.opt.interrupt = nil
		}
		m.chat.end()
		m.checkBijection(ports(32768, 32768))
	})
}

// checkSame expects that flows still have the mappings they had.
func (m *mover) checkSame(before []flowEntry) {
	m.t.Helper()
	for _, e := range before {
		now := m.sweeper.tables[0]
		if !e.key.local.Addr().Is4() {
			now = m.sweeper.tables[1]
		}
		f, ok := now.find(now.forward, e.key)
		r, back := now.find(now.reverse, e.reverseKey())
		if !ok || !back || f.xlate != e.xlate || f.created != e.created || r.xlate != e.key.local || f.packets < e.packets {
			m.t.Errorf("%+v was migrated to %+v and %+v", e, f, r)
		}
	}
}

// pinned is the size of the tables.
func (m *mover) pinned() uint32 {
	m.t.Helper()
	flows, err := pinnedFlows(m.opt.Root)
	if err != nil {
		m.t.Fatal(err)
	}
	return flows
}

// Removed in the middle of a migration, nothing stays.
func TestMigrateThenRemove(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, _ Hook) {
		for _, step := range []string{"commit", "rest"} {
			topo := twoUplinks(t)
			b := newBench(t, topo.Node, Options{Without: without})
			b.apply(nodePolicy2(t, topo))
			b.close()
			b.opt.Flows = 64
			stopped := false
			b.opt.interrupt = func(s string) error {
				if stopped = stopped || s == step; stopped {
					return errStopped
				}
				return nil
			}
			if err := b.tryOpen(b.opt); !errors.Is(err, errStopped) {
				t.Fatalf("%s: %v", step, err)
			}
			remove(t, topo.Node, b.opt.Root)
			for _, dev := range []string{"eth0", "eth1"} {
				if got := chain(t, topo.Node, dev); got != "" {
					t.Errorf("%s: left on %s:\n%s", step, dev, got)
				}
			}
			if _, err := os.Stat(b.opt.Root); !os.IsNotExist(err) {
				t.Errorf("%s: root: %v", step, err)
			}
		}
	})
}
