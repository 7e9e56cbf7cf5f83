package datapath

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// A transfer goes on while agents come and go; each new one replaces the programs
// in place. No packet of the pod is seen untranslated.
func TestTakeOverUnderTraffic(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		b.apply(in)
		leaks := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1, SnapLen: 64}).
			Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
		server, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(topo.WorldAddr.V4, 0))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, server.Close)
		seen, conn, err := lab.AskTCP(within(t, 10*time.Second), topo.Pods[0], netip.AddrPort{}, server.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if seen.Addr() != topo.NodeAddr.V4 {
			t.Fatalf("the world saw %s", seen)
		}
		stop, done := make(chan struct{}), make(chan error, 1)
		go func() { done <- echoUntil(conn, stop) }()
		for range 2 {
			b.close()
			b.open()
			b.apply(in)
		}
		close(stop)
		if err := <-done; err != nil {
			t.Errorf("the connection: %v", err)
		}
		if n := leaks.N(); n != 0 {
			t.Errorf("%d packets left untranslated", n)
		}
		if got := b.attachments(); len(got) != 1 || got[0].Hook != hook {
			t.Errorf("attached %+v", got)
		}
	})
}

// echoUntil sends and receives on an echo connection until stop is closed.
func echoUntil(conn interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	SetDeadline(time.Time) error
}, stop chan struct{}) error {
	buf := make([]byte, 4096)
	for n := 0; ; n++ {
		select {
		case <-stop:
			return nil
		default:
		}
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write(buf); err != nil {
			return fmt.Errorf("round %d: %w", n, err)
		}
		for got := 0; got < len(buf); {
			m, err := conn.Read(buf[got:])
			if err != nil {
				return fmt.Errorf("round %d: %w", n, err)
			}
			got += m
		}
	}
}

// From clsact to tcx and back: no program of the old hook stays, and no packet
// leaves untranslated in between. The qdisc stays, since to delete it stops the
// device for a moment; it goes when the device has drained, and with the data plane.
func TestTakeOverOtherHook(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.TCX)
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{Without: []Feature{TCX}})
	in := nodePolicy(t, topo)
	b.apply(in)
	leaks := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1, SnapLen: 64}).
		Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
	check := func(want string) {
		t.Helper()
		if got := chain(t, topo.Node, "eth0"); got != want {
			t.Errorf("attached:\n%swant:\n%s", got, want)
		}
	}
	const byLink = "ingress tcx ingress_ether\negress tcx egress_ether\n"
	const byFilter = "ingress tc bauta_ingress priority 1\negress tc bauta_egress priority 1\n"
	for _, without := range [][]Feature{nil, AllFeatures(), nil} {
		b.close()
		b.opt.Without = without
		b.open()
		check(map[bool]string{false: byLink, true: byFilter}[without != nil] + "clsact\n")
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
	}
	if n := leaks.N(); n != 0 {
		t.Errorf("%d packets left untranslated", n)
	}
	b.close()
	b.open() // one agent more: the qdisc is still ours
	drained := in
	drained.Devices = nil
	b.apply(drained)
	b.forgetFlows()
	b.sweep()
	check("")
	b.apply(in)
	check(byLink)
	b.close()
	b.opt.Without = []Feature{TCX}
	b.open()
	check(byFilter + "clsact\n")
	b.close()
	b.opt.Without = nil
	b.open()
	b.close()
	if removed := remove(t, topo.Node, b.opt.Root); !slices.Contains(removed, "clsact qdisc of eth0") {
		t.Errorf("removed %q", removed)
	}
	check("")
}

// What a crash leaves: one direction attached, pins half made, pins of devices
// that are gone. The next agent mends all of it.
func TestTakeOverAfterCrash(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{SecondUplink: true})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		eth1, err := topo.Node.Index("eth1")
		if err != nil {
			t.Fatal(err)
		}
		in.Devices = append(in.Devices, policy.Device{Name: "eth1", Index: eth1, Ethernet: true, IPv4: topo.NodeAddr2.V4})
		b.apply(in)
		root := b.opt.Root
		eth0 := in.Devices[0].Index
		// The egress program is off eth0; eth1 is gone and another device has its name.
		if hook == HookTCX {
			b.attached[eth0].links[egress].Close()
			os.Remove(filepath.Join(root, pinLink(egress, eth0)))
			b.attached[eth0].links[egress] = nil
		} else if err := topo.Node.Do(func() error { return delFilters(eth0, egress) }); err != nil {
			t.Fatal(err)
		}
		b.close()
		if err := topo.Node.DeleteLink("eth1"); err != nil {
			t.Fatal(err)
		}
		if err := lab.Link(topo.Node, "eth1", topo.World2, "eth7", lab.LinkOpts{Down: true}); err != nil {
			t.Fatal(err)
		}
		half := filepath.Join(root, pinControl+newSuffix)
		if err := os.Mkdir(half, 0o700); err != nil {
			t.Fatal(err)
		}
		b.open()
		if _, err := os.Stat(half); !os.IsNotExist(err) {
			t.Errorf("half-made pin: %v", err)
		}
		got := b.attachments()
		if len(got) != 1 || got[0].Index != eth0 || got[0].Hook != hook || got[0].Draining {
			t.Errorf("attached %+v", got)
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
		b.apply(nodePolicy(t, topo))
		if names, err := pinNames(root); err != nil || strings.Contains(strings.Join(names, " "), fmt.Sprint("_", eth1)) {
			t.Errorf("pins of the vanished device: %v, %v", names, err)
		}
		if all, err := b.deviceEntries(); err != nil || len(all) != 1 {
			t.Errorf("device entries %v, %v", all, err)
		}
	})
}

// The directory with all pins was removed: filters go on with tables of their own,
// and are replaced only when there is a policy again.
func TestTakeOverRootRemoved(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{Without: []Feature{TCX}})
	b.apply(nodePolicy(t, topo))
	b.close()
	if err := os.RemoveAll(b.opt.Root); err != nil {
		t.Fatal(err)
	}
	b.open()
	if err := askAll(t, topo, topo.NodeAddr); err != nil {
		t.Errorf("before the first policy: %v", err)
	}
	b.apply(nodePolicy(t, topo))
	if err := askAll(t, topo, topo.NodeAddr); err != nil {
		t.Error(err)
	}
	if got := b.attachments(); len(got) != 1 {
		t.Errorf("attached %+v", got)
	}
}

// Tables keep their size unless another one is asked for. An agent refuses one that
// is too small for what is in them, and tables of a layout that it does not know.
// What runs is not touched.
func TestTakeOverTables(t *testing.T) {
	t.Parallel()
	ns := labtest.NewNS(t)
	b := newBench(t, ns, Options{DefaultFlows: 64})
	b.apply(loopPolicy(ports(40000, 10)))
	b.open1(t, tcpFlow, 3)
	seed := func() uint64 {
		st, err := b.state()
		if err != nil {
			t.Fatal(err)
		}
		return st.Seed
	}
	first := seed()
	b.close()
	before, err := pinNames(b.opt.Root)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(opt Options, hint string) {
		t.Helper()
		err := b.tryOpen(opt)
		if err == nil || !strings.Contains(hints(err), hint) {
			t.Errorf("not refused: %v, hints %q", err, hints(err))
		}
		if after, _ := pinNames(b.opt.Root); fmt.Sprint(after) != fmt.Sprint(before) {
			t.Errorf("pins %v, were %v", after, before)
		}
	}
	other := b.opt
	other.Flows = 2
	refused(other, "bpf-nat-global-max to 4 or more")

	setLayout := func(v uint32) {
		t.Helper()
		m, err := ebpf.LoadPinnedMap(filepath.Join(b.opt.Root, pinControl), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		var st masqState
		if err := m.Lookup(uint32(0), &st); err != nil {
			t.Fatal(err)
		}
		st.Layout = v
		if err := m.Put(uint32(0), st); err != nil {
			t.Fatal(err)
		}
	}
	setLayout(mapLayout + 1)
	refused(b.opt, "bauta cleanup")
	setLayout(mapLayout)

	// A table that another version made with other keys.
	fragments := filepath.Join(b.opt.Root, pinFragments)
	if err := os.Remove(fragments); err != nil {
		t.Fatal(err)
	}
	alien, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	err = alien.Pin(fragments)
	alien.Close()
	if err != nil {
		t.Fatal(err)
	}
	refused(b.opt, "bauta cleanup")
	if err := os.Remove(fragments); err != nil {
		t.Fatal(err)
	}

	b.opt.Flows = 64
	b.open()
	if forward, _ := b.entries(); len(forward) != 3 || seed() != first {
		t.Errorf("%d flows, seed %x, was %x", len(forward), seed(), first)
	}
	b.close()
	b.opt.Flows, b.opt.DefaultFlows = 0, 4096
	b.open()
	if n := b.objs.Forward4.MaxEntries(); n != 64 {
		t.Errorf("%d flows", n)
	}
}

// Two agents on one root: the second refuses, and so does Remove.
func TestTakeOverBusy(t *testing.T) {
	t.Parallel()
	b := newBench(t, labtest.NewNS(t), Options{})
	if _, err := Open(b.opt); !errors.Is(err, ErrBusy) || !strings.Contains(hints(err), "--bpf-root") {
		t.Errorf("second agent: %v", err)
	}
	if _, err := Remove(b.opt.Root); !errors.Is(err, ErrBusy) {
		t.Errorf("remove: %v", err)
	}
}

// Places that can't be the root directory, with what to do about it.
func TestTakeOverBadRoot(t *testing.T) {
	t.Parallel()
	labtest.Root(t)
	fs := labtest.BPFFS(t)
	readOnly := labtest.BPFFS(t)
	if err := unix.Mount("", readOnly, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(fs, "link")
	link, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer link.Close()
	if err := link.Pin(plain); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ root, text, hint string }{
		{t.TempDir(), "not on a bpffs", "mount -t bpf"},
		{filepath.Join(readOnly, "bauta"), "read-only", "remount"},
		{plain, "bpf-root", "writable bpffs"},
		{filepath.Join(plain, "bauta"), "bpf-root", "writable bpffs"},
	} {
		d, err := Open(Options{Root: c.root})
		if err == nil {
			d.Close()
			t.Errorf("%s: accepted", c.root)
			continue
		}
		if !strings.Contains(err.Error(), c.text) || !strings.Contains(hints(err), c.hint) {
			t.Errorf("%s: %v\nhints: %s", c.root, err, hints(err))
		}
	}
	// Nothing that is not ours goes away with a wrong root.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ns := labtest.NewNS(t)
	remove(t, ns, dir)
	remove(t, ns, filepath.Join(dir, "missing"))
	remove(t, ns, fs)
	for _, path := range []string{filepath.Join(dir, "precious"), plain} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
}
