package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
)

// loadTime is how long the leak test runs: longer where nobody waits for it, but once.
func loadTime() time.Duration {
	if os.Getenv("CI") != "" && suiteBackend == "" || os.Getenv("BAUTA_LONG") != "" {
		return time.Minute
	}
	return 15 * time.Second
}

// rawSender sends packets that a test has built, of both families.
type rawSender struct{ v4, v6 int }

func newRawSender(t *testing.T, ns *lab.NS) *rawSender {
	t.Helper()
	s := &rawSender{-1, -1}
	err := ns.Do(func() (err error) {
		if s.v4, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW); err != nil {
			return err
		}
		s.v6, err = unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return errors.Join(err, unix.SetsockoptInt(s.v6, unix.IPPROTO_IPV6, unix.IPV6_HDRINCL, 1))
	})
	if err != nil {
		t.Fatalf("raw socket: %v", err)
	}
	t.Cleanup(func() {
		unix.Close(s.v4)
		unix.Close(s.v6)
	})
	return s
}

func (s *rawSender) send(b []byte) error {
	if b[0]>>4 == 4 {
		return unix.Sendto(s.v4, b, 0, &unix.SockaddrInet4{Addr: [4]byte(b[16:20])})
	}
	return unix.Sendto(s.v6, b, 0, &unix.SockaddrInet6{Addr: [16]byte(b[24:40])})
}

// strays are packets that belong to no connection. The first list holds those
// that open nothing, so each of them has to be dropped; the others may open a
// mapping or be dropped, whatever they are.
func strays(rng *rand.Rand, src, dst netip.Addr, dstPort uint16) (dead, rest [][]byte) {
	base := packet.Packet{
		Link: packet.Raw, Src: src, Dst: dst, Proto: packet.TCP, DstPort: dstPort,
		Seq: rng.Uint32(), Ack: rng.Uint32(), ID: rng.Uint32() & 0xffff, Payload: []byte("\x00\x00\x08\x00stray"), // as GRE: of version 0
	}
	with := func(change func(*packet.Packet)) packet.Packet {
		p := base
		p.SrcPort = uint16(40000 + rng.IntN(20000))
		change(&p)
		return p
	}
	for _, flags := range []uint8{packet.FIN | packet.ACK, packet.FIN, packet.RST, packet.RST | packet.ACK, packet.SYN | packet.ACK} {
		dead = append(dead, with(func(p *packet.Packet) {
			p.Flags, p.SrcPort = flags, uint16(1024+rng.IntN(20000))
		}).Build())
	}
	for _, flags := range []uint8{0, packet.ACK, packet.ACK | packet.PSH, packet.SYN | packet.FIN, packet.SYN | packet.RST, 0xff} {
		rest = append(rest, with(func(p *packet.Packet) { p.Flags = flags }).Build())
	}
	for _, proto := range []uint8{packet.GRE, packet.ESP, packet.AH, packet.SCTP, packet.UDPLite, 4, 41, 253} {
		rest = append(rest, with(func(p *packet.Packet) { p.Proto = proto }).Build())
	}
	icmp, echo, unreachable := uint8(packet.ICMP), uint8(8), uint8(3)
	if src.Is6() {
		icmp, echo, unreachable = packet.ICMPv6, 128, 1
	}
	for _, typ := range []uint8{echo, echo ^ 8, 129, 13, 17, 42, 200} {
		rest = append(rest, with(func(p *packet.Packet) { p.Proto, p.Type, p.Ident = icmp, typ, p.SrcPort }).Build())
	}
	// Errors about packets that never were, and about one that makes no sense.
	asked := with(func(p *packet.Packet) { p.Proto = packet.UDP }).Reply()
	rest = append(rest, asked.Error(src, unreachable, 0, 8).Build(), asked.Error(src, unreachable, 4, -1).Build(),
		with(func(p *packet.Packet) { p.Proto, p.Type, p.Payload = icmp, unreachable, []byte{0x45} }).Build())
	// Fragments: all but the first, the first alone, reversed.
	large := with(func(p *packet.Packet) { p.Proto, p.Payload = packet.UDP, make([]byte, 3000) })
	rest = append(rest, large.Fragments(1000)[1:]...)
	large.ID++
	rest = append(rest, large.Fragments(1000)[0])
	large.ID, large.Proto, large.Type = large.ID+1, icmp, echo
	pieces := large.Fragments(1000)
	slices.Reverse(pieces)
	rest = append(rest, pieces...)
	// Options and extension headers, and packets that end too early.
	rest = append(rest, with(func(p *packet.Packet) {
		p.Proto, p.Options = packet.UDP, []byte{1, 1, 1, 1}
		if src.Is6() {
			p.Extensions = []packet.Extension{{Proto: packet.Destination, Body: make([]byte, 6)}, {Proto: packet.Fragment}}
		}
	}).Build())
	for _, cut := range []int{0, 3, 9} {
		p := with(func(p *packet.Packet) { p.Flags = packet.ACK })
		b := p.Build()[:p.HeaderSize()+cut]
		if src.Is6() {
			b[4], b[5] = 0, byte(cut) // of IPv4 the kernel corrects the length
		}
		rest = append(rest, b)
	}
	return dead, rest
}

// load counts what its workers did.
type load struct {
	ctx   context.Context
	group sync.WaitGroup
	mu    sync.Mutex
	done  map[string]int
	errs  []error
	// repeated counts datagrams without an answer that were sent again.
	repeated atomic.Int64
}

// atLeast is how often each worker does its work, however slow the machine is.
const atLeast = 100

// work repeats f until the time is over.
func (l *load) work(name string, every time.Duration, f func() error) {
	l.group.Go(func() {
		tick := time.NewTicker(every)
		defer tick.Stop()
		for i := 0; l.ctx.Err() == nil || i < atLeast; i++ {
			l.note(name, f())
			<-tick.C
		}
	})
}

func (l *load) note(name string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.errs = append(l.errs, fmt.Errorf("%s: %w", name, err))
		return
	}
	l.done[name]++
}

// Nothing that a pod sends, and nothing that happens to the agent, makes a packet
// leave with the pod's address, but towards an excluded destination.
func TestNoLeak(t *testing.T) {
	t.Parallel()
	n := newNode(t, lab.Options{Pods: 2, WorldKnowsPods: true})
	// The strays' first fragments, whose rest never comes, wait a minute in the world. By default
	// they fill its memory for reassembly, and it takes no other fragments.
	for _, key := range []string{"net.ipv6.ip6frag_high_thresh", "net.ipv4.ipfrag_high_thresh"} {
		if err := n.World.Sysctl(key, "67108864"); err != nil {
			t.Fatal(err)
		}
	}
	rng := labtest.Rand(t)
	list := n.writeList("10.0.0.0/8", n.Excluded.V4.String()+"/32", n.Excluded.V6.String()+"/128")
	// Short timers: late packets find no mapping any more.
	n.start(podCIDRs, "--leak-sentinel", "--enable-ip-masq-agent", "--ip-masq-agent-config-path="+list,
		"--nat-timeout-tcp-closing=1s", "--nat-timeout-udp=1s", "--nat-timeout-udp-stream=2s", "--nat-timeout-icmp=1s",
		"--nat-timeout-other=1s")
	wire := n.watchWire(append(n.Excluded.All(), n.Excluded10)...)
	excluded := wire.capture.Count(func(p lab.Packet) bool {
		f, ok := lab.ParseFrame(p.Data)
		return ok && p.Outgoing && isPod(f.Src)
	})
	bare := wire.capture.Count(func(p lab.Packet) bool {
		f, ok := lab.ParseFrame(p.Data)
		return ok && p.Outgoing && f.Proto == packet.GRE && f.Src == n.NodeAddr.Of(f.Src)
	})

	ctx, cancel := context.WithTimeout(t.Context(), loadTime())
	defer cancel()
	l := &load{ctx: ctx, done: make(map[string]int)}
	var dead atomic.Int64
	var late []func() int64
	for _, dst := range n.WorldAddr.All() {
		late = append(late, n.startLoad(t, l, dst))
		seed := rng.Uint64()
		n.startStrays(t, l, dst, rand.New(rand.NewPCG(seed, 1)), &dead)
	}
	n.crashes(l, loadTime()/12)
	l.group.Wait()
	n.cli("bpf", "nat", "flush")
	for _, send := range late {
		dead.Add(send())
	}

	wire.check(t)
	if len(l.errs) > 0 {
		t.Errorf("%d failures among %v; the first: %v", len(l.errs), l.done, errors.Join(l.errs[:min(5, len(l.errs))]...))
	}
	if most := int64(2 + 2*l.done["kill"]); l.repeated.Load() > most {
		t.Errorf("%d datagrams had to be repeated, want at most %d, those of the changes of hook", l.repeated.Load(), most)
	}
	for _, name := range slices.Sorted(maps.Keys(l.done)) {
		least := atLeast
		if name == "kill" {
			least = 2
		}
		if l.done[name] < least {
			t.Errorf("%s: %d times, want at least %d for the test to prove something", name, l.done[name], least)
		}
	}
	if excluded.N() == 0 || bare.N() == 0 {
		t.Errorf("the wire saw %d packets to excluded destinations and %d translated GRE packets", excluded.N(), bare.N())
	}
	// The wire is one witness, the sentinel the other; it is a program, too.
	if l := n.status().Leaks; l.Packets != 0 || l.Sentinel != (n.backend == "") {
		t.Errorf("the leak sentinel: %+v", l)
	}
	drops := n.status().Drops
	t.Logf("load %v, drops %v, %d packets that must be dropped", l.done, drops, dead.Load())
	// The kernel may have dropped some of them before us.
	if int64(drops["drop-stray"]) < dead.Load()*9/10 {
		t.Errorf("drop-stray counts %d, sent were %d", drops["drop-stray"], dead.Load())
	}
	n.wantCounts(func(c map[string]uint64) bool {
		return c["drop-fragment"] > 0 && c["masq-new"] > 0 && c["masq-known"] > 0 && c["pass-nonmasq"] > 0
	})
}

// crashes kills the agent and starts it again, by turns on either hook, until the
// load ends.
func (n *node) crashes(l *load, every time.Duration) {
	n.t.Helper()
	tick := time.NewTicker(every)
	defer tick.Stop()
	for down := false; ; down = !down {
		select {
		case <-l.ctx.Done():
			if down {
				n.start(n.agent.args...)
			}
			return
		case <-tick.C:
		}
		if down {
			n.noTCX = !n.noTCX
			n.start(n.agent.args...)
			continue
		}
		n.kill()
		l.note("kill", nil)
	}
}

// startLoad starts what well-behaved pods do, and what hurried ones do.
//
// The function that it returns sends late packets of the connections that have
// ended, and says how many.
func (n *node) startLoad(t *testing.T, l *load, dst netip.Addr) (late func() int64) {
	t.Helper()
	const every = 15 * time.Millisecond
	pod, fam := n.Pods[0], " "+family(dst)
	want := n.NodeAddr.Of(dst)
	tcp, rst := server(t, lab.EchoTCP, n.World, anyPort(dst)), server(t, lab.EchoTCP, n.World, anyPort(dst))
	udp := server(t, lab.EchoUDP, n.World, anyPort(dst))
	notMasqueraded := server(t, lab.EchoTCP, n.World, anyPort(n.Excluded.Of(dst)))
	raw := newRawSender(t, pod)
	// Not the test's context: it would cut the last ones short.
	limit := func() (context.Context, context.CancelFunc) { return context.WithTimeout(t.Context(), 20*time.Second) }
	// ask connects, exchanges a few bytes and closes, with a FIN or with a RST.
	ask := func(server netip.AddrPort, want netip.Addr, reset bool) (local netip.AddrPort, err error) {
		ctx, cancel := limit()
		defer cancel()
		seen, c, err := lab.AskTCP(ctx, pod, netip.AddrPort{}, server)
		if err != nil {
			return local, err
		}
		defer c.Close()
		if seen.Addr() != want {
			return local, fmt.Errorf("seen as %s", seen)
		}
		if reset {
			c.SetLinger(0)
		}
		return netip.MustParseAddrPort(c.LocalAddr().String()), exchange(c)
	}
	afterwards := func(local netip.AddrPort, flags ...uint8) error {
		for _, f := range flags {
			p := packet.Packet{Link: packet.Raw, Src: local.Addr(), Dst: rst.Addr(), Proto: packet.TCP,
				SrcPort: local.Port(), DstPort: rst.Port(), Flags: f, Seq: 1, Ack: 1}
			if err := raw.send(p.Build()); err != nil {
				return err
			}
		}
		return nil
	}
	l.work("tcp"+fam, every, func() error {
		_, err := ask(tcp, want, false)
		return err
	})
	l.work("excluded"+fam, every, func() error {
		_, err := ask(notMasqueraded, n.PodAddrs[0].Of(dst), false)
		return err
	})
	var ended []netip.AddrPort
	l.work("rst"+fam, every, func() error {
		local, err := ask(rst, want, true)
		if err != nil {
			return err
		}
		ended = append(ended, local)
		return afterwards(local, packet.FIN|packet.ACK, packet.ACK, packet.RST, packet.SYN|packet.ACK)
	})
	l.work("udp"+fam, every, func() error {
		ctx, cancel := limit()
		defer cancel()
		var seen netip.AddrPort
		err := errors.New("no answer")
		for try := range 3 { // nobody repeats a datagram, and adding a clsact qdisc stops the device for a moment
			one, cancel := context.WithTimeout(ctx, 3*time.Second)
			seen, err = lab.AskUDP(one, pod, netip.AddrPort{}, udp, make([]byte, 2000))
			cancel()
			if err == nil {
				break
			}
			if try == 0 {
				l.repeated.Add(1)
			}
		}
		if err == nil && seen.Addr() != want {
			err = fmt.Errorf("seen as %s", seen)
		}
		return err
	})
	var id atomic.Uint32
	l.work("icmp"+fam, every, func() error {
		ctx, cancel := limit()
		defer cancel()
		err := errors.New("no answer")
		for range 5 { // an echo request is not repeated by itself
			one, cancel := context.WithTimeout(ctx, 3*time.Second)
			_, err = lab.Ping(one, pod, dst, uint16(id.Add(1)), 1, 100)
			cancel()
			if err == nil {
				break
			}
		}
		return err
	})
	return func() (sent int64) {
		t.Helper()
		flags := []uint8{packet.FIN | packet.ACK, packet.RST, packet.RST | packet.ACK, packet.SYN | packet.ACK}
		for _, local := range ended {
			if err := afterwards(local, flags...); err != nil {
				t.Fatal(err)
			}
			sent += int64(len(flags))
		}
		return sent
	}
}

// startStrays starts what no pod should send.
func (n *node) startStrays(t *testing.T, l *load, dst netip.Addr, rng *rand.Rand, dead *atomic.Int64) {
	t.Helper()
	raw := newRawSender(t, n.Pods[1])
	at := server(t, lab.EchoTCP, n.World, anyPort(dst)) // some meet a server, some do not
	l.work("strays "+family(dst), 50*time.Millisecond, func() error {
		port := at.Port()
		if rng.IntN(2) == 0 {
			port = 9
		}
		must, rest := strays(rng, n.PodAddrs[1].Of(dst), dst, port)
		for i, b := range append(must, rest...) {
			if err := raw.send(b); err != nil {
				return fmt.Errorf("packet %d (% x...): %w", i, b[:min(len(b), 48)], err)
			}
			if i < len(must) {
				dead.Add(1)
			}
		}
		return nil
	})
}
