package datapath

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// move gives a device to another network namespace; its programs go with it.
func move(t testing.TB, from *lab.NS, dev string, to *lab.NS) {
	t.Helper()
	err := to.WithFD(func(fd int) error {
		return from.Do(func() error {
			l, err := netlink.LinkByName(dev)
			if err != nil {
				return err
			}
			return netlink.LinkSetNsFd(l, fd)
		})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A device moved to another network namespace while no agent ran: the next one
// takes its programs off it, and goes on with the other device. If all have moved,
// the data plane is that of the other namespace.
func TestTakeOverMovedDevice(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.TCX)
	topo := labtest.NewNode(t, lab.Options{SecondUplink: true})
	pod := labtest.NewNS(t)
	b := newBench(t, topo.Node, Options{})
	in := nodePolicy2(t, topo)
	eth1 := in.Devices[1].Index
	b.apply(in)
	b.close()
	move(t, topo.Node, "eth1", pod)
	if got := chain(t, pod, "eth1"); !strings.Contains(got, "egress_ether") {
		t.Fatalf("the programs did not move with the device: %q", got)
	}
	// What can't be opened at all is no hindrance either.
	odd, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer odd.Close()
	if err := odd.Pin(filepath.Join(b.opt.Root, pinLink(egress, 4711))); err != nil {
		t.Fatal(err)
	}
	b.open()
	if got := b.attachments(); len(got) != 1 || got[0].Device != "eth0" || !b.healthy() {
		t.Errorf("attached %+v", got)
	}
	if got := chain(t, pod, "eth1"); got != "" {
		t.Errorf("still on the moved device:\n%s", got)
	}
	if _, err := os.Stat(filepath.Join(b.opt.Root, pinLink(egress, eth1))); !os.IsNotExist(err) {
		t.Errorf("pin of the moved device: %v", err)
	}
	in = nodePolicy(t, topo)
	b.apply(in)
	if all, err := b.deviceEntries(); err != nil || len(all) != 1 {
		t.Errorf("device entries %v, %v", all, err)
	}
	if err := askAll(t, topo, topo.NodeAddr); err != nil {
		t.Error(err)
	}
	b.close()
	move(t, topo.Node, "eth0", pod)
	if err := b.tryOpen(b.opt); err == nil || !strings.Contains(hints(err), "--bpf-root") {
		t.Errorf("all in another namespace: %v", err)
	}
	if got := chain(t, pod, "eth0"); !strings.Contains(got, "egress_ether") {
		t.Errorf("taken off in another namespace: %q", got)
	}
}

// A device moves while the agent runs.
func TestAttachMovedDevice(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{SecondUplink: true})
		pod := labtest.NewNS(t)
		b := newBench(t, topo.Node, Options{Without: without})
		b.apply(nodePolicy2(t, topo))
		move(t, topo.Node, "eth1", pod)
		b.apply(nodePolicy(t, topo))
		if got := b.attachments(); len(got) != 1 || got[0].Device != "eth0" || !b.healthy() {
			t.Errorf("attached %+v", got)
		}
		if got := chain(t, pod, "eth1"); strings.Contains(got, "gress_ether") || strings.Contains(got, "bauta") {
			t.Errorf("still on the moved device:\n%s", got)
		}
	})
}
