package datapath

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// layout1Setting is struct setting of layout 1.
type layout1Setting struct {
	Enabled          [2]uint32
	UnknownProtocols uint32
	Timeout          [7]uint32
	Ports            uint32
	Routes           uint32
	Source           [256][4]uint32
	Stride           [64]uint32
	InPool           [1024]uint64
	Guarded          [1024]uint64
	Port             [65536]uint16
}

type layout1Prefix struct {
	Length uint32
	Addr   [16]byte
}

type layout1Rule struct {
	Outcome uint8
	Listed  uint8
	Source  uint16
}

// layout1 is the data plane of the first release, made from its own object
// (testdata/layout1.o.gz) as its agent did.
type layout1Plane struct {
	t    *testing.T
	spec *ebpf.CollectionSpec
	coll *ebpf.Collection
	root string
}

const (
	layout1Seed  = 0x0123456789abcdef
	layout1Learn = 77
)

// startLayout1 makes it in a node with two uplinks; it works without an agent.
func startLayout1(t *testing.T, topo *lab.Topology, in policy.Input, hook Hook) (root string) {
	t.Helper()
	p := &layout1Plane{t: t, root: filepath.Join(labtest.BPFFS(t), "bauta")}
	if err := os.Mkdir(p.root, 0o700); err != nil {
		t.Fatal(err)
	}
	p.must(rlimit.RemoveMemlock()) // before 5.11, as its agent did
	p.load()
	defer p.coll.Close()
	p.apply(in)
	p.attach(topo, in, hook)
	return p.root
}

func (p *layout1Plane) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *layout1Plane) load() {
	p.t.Helper()
	packed, err := os.ReadFile("testdata/layout1.o.gz")
	p.must(err)
	r, err := gzip.NewReader(bytes.NewReader(packed))
	p.must(err)
	object, err := io.ReadAll(r)
	p.must(err)
	p.spec, err = ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	p.must(err)
	for _, name := range []string{"egress_raw", "ingress_raw"} {
		delete(p.spec.Programs, name)
	}
	for _, name := range flowPins {
		p.spec.Maps[name].MaxEntries = moverFlows
	}
	p.coll, err = ebpf.NewCollectionWithOptions(p.spec, ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: p.root}})
	p.must(err)
	p.must(p.coll.Programs["reap"].Pin(filepath.Join(p.root, pinReap)))
}

func (p *layout1Plane) outcome(name string) uint8 {
	p.t.Helper()
	var enum *btf.Enum
	p.must(p.spec.Types.TypeByName("outcome", &enum))
	for _, v := range enum.Values {
		if v.Name == name {
			return uint8(v.Value)
		}
	}
	p.t.Fatalf("layout 1 has no %s", name)
	return 0
}

// apply writes the policy of generation 0.
func (p *layout1Plane) apply(in policy.Input) {
	p.t.Helper()
	set := &layout1Setting{Enabled: [2]uint32{1, 1}, Ports: uint32(len(in.Ports)), Stride: strides(len(in.Ports))}
	set.Timeout = [7]uint32{240, 7440, 240, 120, 300, 60, 600}
	copy(set.Port[:], in.Ports)
	for _, port := range in.Ports {
		set.InPool[port/64] |= 1 << (port % 64)
	}
	set.Guarded = set.InPool
	set.Guarded[0] = 1 << 9 // of a pool before
	p.must(p.coll.Maps[pinSettings].Put(uint32(0), set))
	for i, name := range []string{"source", "destination", "route"} {
		inner := p.spec.Maps[pinPolicies].InnerMap.Copy()
		inner.Name = name
		m, err := ebpf.NewMap(inner)
		p.must(err)
		defer m.Close()
		add := func(prefix netip.Prefix, r layout1Rule) {
			k := layout1Prefix{uint32(prefix.Bits()), prefix.Addr().As16()}
			if prefix.Addr().Is4() {
				k.Length += 96
			}
			p.must(m.Put(k, r))
		}
		if i == 0 {
			for _, r := range in.Sources {
				add(r.Prefix, layout1Rule{})
			}
			for _, a := range in.HostAddrs {
				add(netip.PrefixFrom(a, a.BitLen()), layout1Rule{Outcome: p.outcome("OUT_PASS_HOST")})
			}
			add(netip.PrefixFrom(netip.IPv4Unspecified(), 0), layout1Rule{Outcome: p.outcome("OUT_PASS_SOURCE")})
		}
		p.must(p.coll.Maps[pinPolicies].Put(uint32(i), m))
		p.must(m.Pin(filepath.Join(p.root, name+"_0")))
	}
	for _, dev := range in.Devices {
		value := [2][16]byte{}
		value[0] = dev.IPv4.As16()
		if dev.IPv6.IsValid() {
			value[1] = dev.IPv6.As16()
		}
		p.must(p.coll.Maps[pinDevices].Put(uint32(dev.Index), value))
	}
	p.must(p.coll.Maps[pinControl].Put(uint32(0), struct {
		Active, Layout, LearnUntil, Pad uint32
		Seed                            uint64
	}{0, 1, layout1Learn, 0, layout1Seed}))
}

func (p *layout1Plane) attach(topo *lab.Topology, in policy.Input, hook Hook) {
	p.t.Helper()
	p.must(topo.Node.Do(func() error {
		for _, dir := range directions {
			prog := p.coll.Programs[dir.String()+"_ether"]
			for _, dev := range in.Devices {
				if hook == HookTC {
					if err := attachTC(p.root, &attachment{name: dev.Name, index: dev.Index}, dir, prog); err != nil {
						return err
					}
					continue
				}
				l, err := link.AttachTCX(link.TCXOptions{Interface: dev.Index, Program: prog, Attach: dir.tcx()})
				if err != nil {
					return err
				}
				if err := errors.Join(l.Pin(filepath.Join(p.root, pinLink(dir, dev.Index))), l.Close()); err != nil {
					return err
				}
			}
		}
		return nil
	}))
}

// An upgrade from the first release, under traffic: its flows, and what else outlives
// its tables, go into those of this version. It happens at the first Apply; before
// that nothing is touched. A crash in the middle is no exception.
func TestMigrateLayout1(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := twoUplinks(t)
		stops := []string{"", "commit", "egress eth1", "behind eth1", "pin " + pinReap, "clean", "discard"}
		for _, stop := range labtest.Thin(t, "stops", stops) {
			t.Run("stopped before "+stop, func(t *testing.T) { upgradeLayout1(t, topo, without, hook, stop) })
		}
	})
}

func upgradeLayout1(t *testing.T, topo *lab.Topology, without []Feature, hook Hook, stop string) {
	m := &mover{topo: topo, in: nodePolicy2(t, topo)}
	root := startLayout1(t, topo, m.in, hook)
	t.Cleanup(func() { remove(t, topo.Node, root) })
	m.watch(t)
	t.Cleanup(m.chat.end)
	stopped := false
	opt := Options{Root: root, Without: without, interrupt: func(step string) error {
		if stopped = stopped || step == stop; stopped {
			return errStopped
		}
		return nil
	}}
	m.bench = newBench(t, topo.Node, opt)
	if layout, ok, err := readLayout(root); layout != 1 || !ok || err != nil {
		t.Fatalf("touched before Apply: layout %d, %v", layout, err)
	}
	m.chat.goesOn("opened")
	m.inspect(func(in *Inspector) error { // what an agent starts from
		list, err := in.Exclusions()
		usage, err1 := in.Usage()
		_, err2 := in.WorstPort()
		_, err3 := in.PortSearches()
		_, err4 := in.Flush(Filter{Pod: netip.MustParseAddr("192.0.2.1")})
		if !in.Applied() || len(list) != 0 || usage[0].Flows < 10 {
			t.Errorf("a reader of layout 1: applied %t, exclusions %v, %+v", in.Applied(), list, usage)
		}
		return errors.Join(err, err1, err2, err3, err4)
	})
	if got := m.seen(); len(got) != 2 || got[0].Hook != hook || got[0].Draining {
		t.Errorf("a reader of layout 1: attached %+v", got)
	}
	before := layout1Flows(t, root)
	err := m.tryApply(m.in)
	m.chat.goesOn("stopped")
	if stop != "" {
		if !stopped || err == nil {
			t.Fatalf("not stopped: %v", err)
		}
		m.close()
		m.chat.goesOn("without an agent")
		m.opt.interrupt = nil
		m.open()
		err = m.tryApply(m.in)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.checkMigrated("upgraded", moverFlows)
	m.checkSame(before)
	if layout, ok, err := readLayout(root); layout != mapLayout || !ok || err != nil {
		t.Errorf("layout %d, %v", layout, err)
	}
	st, err := m.state()
	if err != nil || st.Seed != layout1Seed || st.LearnUntil != layout1Learn {
		t.Errorf("state %+v, %v", st, err)
	}
	var set masqSetting
	if err := m.objs.Settings.Lookup(st.Active, &set); err != nil || set.Guarded[0] != 1<<9 || set.Guarded[32768/64] != ^uint64(0) {
		t.Errorf("guarded ports %x, %v", set.Guarded[0], err)
	}
	m.chat.end()
	m.checkBijection(ports(32768, 32768))
	if s := m.sweep(); s.Vanished != 0 {
		t.Errorf("%+v", s)
	}
}

// layout1Flows reads the forward tables.
func layout1Flows(t *testing.T, root string) (flows []flowEntry) {
	t.Helper()
	p, err := openPredecessor(root, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	collect := pass{keep: func(e flowEntry) bool { flows = append(flows, e); return false }}
	if err := p.copyTo(p.tables, collect, pinForward4, pinForward6); err == nil && len(flows) > 0 {
		t.Fatal("a table was copied to itself")
	}
	for _, name := range []string{pinForward4, pinForward6} {
		if err := p.carrier(name)(p.tables[name], nil, collect); err != nil {
			t.Fatal(err)
		}
	}
	if len(flows) < 20 {
		t.Fatalf("%d flows", len(flows))
	}
	return flows
}

// seen is what a reader sees attached.
func (m *mover) seen() (list []Attachment) {
	m.t.Helper()
	m.inspect(func(in *Inspector) error {
		return m.ns.Do(func() (err error) {
			list, err = in.Attachments()
			return err
		})
	})
	return list
}
