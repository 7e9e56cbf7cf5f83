package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// TestMain fails a run that leaves descriptors of BPF objects open.
func TestMain(m *testing.M) {
	before := bpfDescriptors()
	code := m.Run()
	// The library closes what a test forgot when the garbage collector sees it: don't let it.
	if after := bpfDescriptors(); after > before && code == 0 {
		fmt.Fprintf(os.Stderr, "%d descriptors of BPF objects are still open\n", after-before)
		code = 1
	}
	os.Exit(code)
}

// bpfDescriptors counts the open maps, programs and links, but for those that the
// libraries keep for their probes.
func bpfDescriptors() int {
	n := 0
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(to, "anon_inode:bpf") {
			n++
		}
	}
	return n
}

// bench is a data plane in a network namespace of a test.
type bench struct {
	*Datapath
	t   testing.TB // the subtest at work
	ns  *lab.NS
	opt Options
}

// newBench opens a data plane on a bpffs of its own and closes it with the test.
func newBench(t testing.TB, ns *lab.NS, opt Options) *bench {
	t.Helper()
	if opt.Root == "" {
		opt.Root = labtest.BPFFS(t) + "/bauta"
	}
	opt.AllowPrivateBPFFS = true
	if opt.DefaultFlows == 0 {
		opt.DefaultFlows = 1024
	}
	r := &bench{t: t, ns: ns, opt: opt}
	t.Cleanup(r.close)
	r.open()
	return r
}

func (b *bench) open() {
	b.t.Helper()
	if err := b.tryOpen(b.opt); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) tryOpen(opt Options) error {
	return b.ns.Do(func() error {
		d, err := Open(opt)
		if err == nil {
			b.Datapath = d
		}
		return err
	})
}

func (b *bench) close() {
	b.t.Helper()
	if b.Datapath == nil {
		return
	}
	if err := b.Datapath.Close(); err != nil {
		b.t.Error(err)
	}
	b.Datapath = nil
}

func (b *bench) tryApply(in policy.Input) error {
	p, err := policy.Build(in)
	if err != nil {
		return err
	}
	return b.ns.Do(func() error { return b.Apply(context.Background(), p) })
}

func (b *bench) apply(in policy.Input) {
	b.t.Helper()
	if err := b.tryApply(in); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) sweep() Swept {
	b.t.Helper()
	var s Swept
	err := b.ns.Do(func() (err error) {
		s, err = b.Sweep(context.Background())
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// attachments are those the data plane knows, and those a reader sees: they agree.
func (b *bench) attachments() []Attachment {
	b.t.Helper()
	var own, seen []Attachment
	err := b.ns.Do(func() error {
		own = b.Attached()
		in, err := Inspect(b.opt.Root)
		if err != nil {
			return err
		}
		defer in.Close()
		seen, err = in.Attachments()
		return err
	})
	if err != nil {
		b.t.Fatal(err)
	}
	if fmt.Sprint(own) != fmt.Sprint(seen) {
		b.t.Errorf("attached %v, a reader sees %v", own, seen)
	}
	return own
}

func (b *bench) inspect(f func(*Inspector) error) {
	b.t.Helper()
	in, err := Inspect(b.opt.Root)
	if err != nil {
		b.t.Fatal(err)
	}
	defer in.Close()
	if err := f(in); err != nil {
		b.t.Fatal(err)
	}
}

// count is the number of packets with an outcome, in both directions and families.
func (b *bench) count(o policy.Outcome) (n uint64) {
	b.t.Helper()
	b.inspect(func(in *Inspector) error {
		counts, err := in.Counts()
		for _, c := range counts {
			if c.Outcome == o {
				n += c.Packets
			}
		}
		return err
	})
	return n
}

// ports are the n ports from first on.
func ports(first, n int) []uint16 {
	all := make([]uint16, n)
	for i := range all {
		all[i] = uint16(first + i)
	}
	return all
}

// loopPolicy masquerades everything from the pod ranges that leaves through the
// loopback device, where the tests run programs by hand.
func loopPolicy(pool []uint16) policy.Input {
	dev := policy.Device{Name: "lo", Index: loopback, Ethernet: true,
		IPv4: netip.MustParseAddr("192.0.2.1"), IPv6: netip.MustParseAddr("2001:db8:2::1")}
	return policy.Input{
		IPv4: true, IPv6: true,
		Sources:   []policy.Rule{{Prefix: netip.MustParsePrefix("10.0.0.0/8")}, {Prefix: netip.MustParsePrefix("fd00::/16")}},
		HostAddrs: []netip.Addr{dev.IPv4, dev.IPv6},
		Devices:   []policy.Device{dev},
		Ports:     pool,
	}
}

// nodePolicy masquerades the pods of a topology on eth0.
func nodePolicy(t testing.TB, topo *lab.Topology) policy.Input {
	t.Helper()
	index, err := topo.Node.Index("eth0")
	if err != nil {
		t.Fatal(err)
	}
	return policy.Input{
		IPv4: true, IPv6: true,
		Sources:   []policy.Rule{{Prefix: lab.PodRange4}, {Prefix: lab.PodRange6}},
		HostAddrs: append(topo.NodeAddr.All(), topo.PodGateway.All()...),
		Devices: []policy.Device{{Name: "eth0", Index: index, Ethernet: true,
			IPv4: topo.NodeAddr.V4, IPv6: topo.NodeAddr.V6}},
		Ports: ports(32768, 32768),
	}
}

// within is a context for one step of a test.
func within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), labtest.Patience(d))
	t.Cleanup(cancel)
	return ctx
}

// hints returns the advice in an error.
func hints(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return strings.Join(e.Hints, "\n")
	}
	return ""
}
