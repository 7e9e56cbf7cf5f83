package datapath

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// A device is deleted and made again: the new one is another device, whatever its
// name, and is attached when a policy names it.
func TestAttachDeviceMadeAgain(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{SecondUplink: true})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		add := func() policy.Device {
			t.Helper()
			index, err := topo.Node.Index("eth1")
			if err != nil {
				t.Fatal(err)
			}
			return policy.Device{Name: "eth1", Index: index, Ethernet: true, IPv4: topo.NodeAddr2.V4}
		}
		old := add()
		in.Devices = append(in.Devices, old)
		b.apply(in)
		if got := b.attachments(); len(got) != 2 {
			t.Fatalf("attached %+v", got)
		}
		if err := topo.Node.DeleteLink("eth1"); err != nil {
			t.Fatal(err)
		}
		if err := lab.Link(topo.Node, "eth1", topo.World2, "eth7", lab.LinkOpts{Down: true}); err != nil {
			t.Fatal(err)
		}
		if got := b.attachments(); len(got) != 1 || got[0].Device != "eth0" {
			t.Errorf("deleted: attached %+v", got)
		}
		// A policy of a moment ago still names the old device; the rest of it works.
		if err := b.tryApply(in); err == nil || !strings.Contains(err.Error(), "eth1") {
			t.Errorf("policy with a deleted device: %v", err)
		}
		in.Devices[1] = add()
		b.apply(in)
		got := b.attachments()
		if len(got) != 2 || got[1].Index != in.Devices[1].Index || got[1].Index == old.Index || got[1].Hook != hook {
			t.Errorf("made again: attached %+v", got)
		}
		if all, err := b.deviceEntries(); err != nil || len(all) != 2 {
			t.Errorf("device entries %v, %v", all, err)
		}
		// Renamed, it is the same device.
		if err := topo.Node.Rename("eth1", "wan"); err != nil {
			t.Fatal(err)
		}
		if got := b.attachments(); len(got) != 2 || got[1].Device != "wan" {
			t.Errorf("renamed: attached %+v", got)
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
	})
}

// A device that is no masquerade device any more keeps its flows and makes no new
// ones; it is detached when the last flow of its time has ended, whatever goes on
// elsewhere.
func TestAttachDraining(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		b.apply(in)
		server, err := lab.EchoUDP(topo.World, netip.AddrPortFrom(topo.WorldAddr.V4, 0))
		if err != nil {
			t.Fatal(err)
		}
		labtest.Close(t, server.Close)
		conn, err := lab.DialUDP(within(t, time.Minute), topo.Pods[0], netip.AddrPort{}, server.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ask := func() {
			t.Helper()
			seen, err := lab.AskUDPOn(within(t, 5*time.Second), conn, []byte("x"))
			if err != nil || seen.Addr() != topo.NodeAddr.V4 {
				t.Errorf("the world saw %s, %v", seen, err)
			}
		}
		ask()
		in.Devices = nil
		b.apply(in)
		if got := b.attachments(); len(got) != 1 || !got[0].Draining {
			t.Errorf("attached %+v", got)
		}
		ask()
		b.sweep()
		b.close()
		b.open() // a new agent goes on with it
		b.apply(in)
		b.sweep()
		if got := b.attachments(); len(got) != 1 || !got[0].Draining {
			t.Errorf("attached %+v", got)
		}
		ask()
		before := b.count(policy.PassDevice)
		if _, err := lab.AskUDP(within(t, 200*time.Millisecond), topo.Pods[0], netip.AddrPort{}, server.Addr, nil); err == nil {
			t.Error("a new flow was answered")
		}
		if b.count(policy.PassDevice) == before {
			t.Error("a new flow was mapped")
		}
		b.forgetFlows()
		b.sweep()
		if got := chain(t, topo.Node, "eth0"); got != "" {
			t.Errorf("still attached:\n%s", got)
		}
	})
}

// Programs of others stay, whatever we do, and are named when they come before
// ours. So stays a clsact qdisc that others use.
func TestAttachAmongForeignPrograms(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		index, err := topo.Node.Index("eth0")
		if err != nil {
			t.Fatal(err)
		}
		foreign := foreignProgram(t)
		filter := func(dir direction, priority uint16, protocol uint16) {
			t.Helper()
			err := topo.Node.Do(func() error {
				return netlink.FilterAdd(&netlink.BpfFilter{
					FilterAttrs: netlink.FilterAttrs{LinkIndex: index, Parent: filterParent(dir), Handle: 1, Priority: priority, Protocol: protocol},
					Fd:          foreign.FD(), Name: "theirs", DirectAction: true,
				})
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := topo.Node.Do(func() error { return netlink.QdiscAdd(clsact(index)) }); err != nil {
			t.Fatal(err)
		}
		filter(egress, 1, unix.ETH_P_IP) // takes the first priority for a protocol of its own
		filter(ingress, 1, unix.ETH_P_ALL)
		if hook == HookTCX {
			attachForeign(t, topo.Node, index, foreign, link.Tail())
		}
		before := chain(t, topo.Node, "eth0")
		b := newBench(t, topo.Node, Options{Without: without})
		b.apply(nodePolicy(t, topo))
		ahead := map[Hook]string{HookTCX: "[]", HookTC: "[bpf filter theirs, priority 1]"}[hook]
		if got := b.attachments(); len(got) != 1 || fmt.Sprint(got[0].Ahead) != ahead {
			t.Errorf("attached %+v", got)
		}
		if hook == HookTCX {
			attachForeign(t, topo.Node, index, foreignProgram(t), link.Head())
			before = "" // another one by now: compared below
			if got := b.attachments(); len(got) != 1 || fmt.Sprint(got[0].Ahead) != "[foreign]" {
				t.Errorf("behind another program: %+v", got)
			}
		}
		if err := askAll(t, topo, topo.NodeAddr); err != nil {
			t.Error(err)
		}
		b.close()
		b.open()
		b.apply(nodePolicy(t, topo))
		b.close()
		remove(t, topo.Node, b.opt.Root)
		after := chain(t, topo.Node, "eth0")
		if before != "" && after != before || strings.Count(after, "foreign") != map[Hook]int{HookTCX: 2}[hook] ||
			strings.Count(after, "theirs") != 2 || strings.Contains(after, "gress_ether") || !strings.Contains(after, "clsact") {
			t.Errorf("before:\n%safter:\n%s", before, after)
		}
	})
}

func attachForeign(t testing.TB, ns *lab.NS, index int, prog *ebpf.Program, where link.Anchor) {
	t.Helper()
	err := ns.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: prog, Attach: ebpf.AttachTCXEgress, Anchor: where})
		if err == nil {
			labtest.Close(t, l.Close)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
