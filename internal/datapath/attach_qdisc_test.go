package datapath

import (
	"errors"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// ingressQdisc is the classic one, of the handle of clsact.
func ingressQdisc(index int) netlink.Qdisc {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
}

// nodePolicy2 is nodePolicy with the second uplink.
func nodePolicy2(t testing.TB, topo *lab.Topology) policy.Input {
	t.Helper()
	in := nodePolicy(t, topo)
	index, err := topo.Node.Index("eth1")
	if err != nil {
		t.Fatal(err)
	}
	in.Devices = append(in.Devices, policy.Device{Name: "eth1", Index: index, Ethernet: true, IPv4: topo.NodeAddr2.V4})
	return in
}

// An ingress qdisc would take an egress filter and run it on arriving packets. The
// device is not attached and says why; the other one is, and what others have
// there stays. With clsact in its place the device is attached.
func TestAttachIngressQdisc(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{SecondUplink: true})
	b := newBench(t, topo.Node, Options{Without: []Feature{TCX}})
	in := nodePolicy2(t, topo)
	eth1 := in.Devices[1].Index
	foreign := foreignProgram(t)
	do := func(f func() error) {
		t.Helper()
		if err := topo.Node.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	do(func() error {
		return errors.Join(netlink.QdiscAdd(ingressQdisc(eth1)), netlink.FilterAdd(&netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{LinkIndex: eth1, Parent: filterParent(ingress), Handle: 1, Priority: 1, Protocol: unix.ETH_P_ALL},
			Fd:          foreign.FD(), Name: "theirs", DirectAction: true,
		}))
	})
	before := chain(t, topo.Node, "eth1")
	check := func() {
		t.Helper()
		err := b.tryApply(in)
		if !errors.Is(err, ErrAttach) || !strings.Contains(err.Error(), "device eth1 has an ingress qdisc") ||
			!strings.Contains(hints(err), "tc qdisc add dev eth1 clsact") {
			t.Errorf("%v\nhints: %s", err, hints(err))
		}
		if got := b.attachments(); len(got) != 1 || got[0].Device != "eth0" {
			t.Errorf("attached %+v", got)
		}
		if after := chain(t, topo.Node, "eth1"); after != before {
			t.Errorf("was:\n%sis:\n%s", before, after)
		}
	}
	check()
	check()
	// What an agent before this one left there goes away, and never counts as attached.
	do(func() error { return putFilter(eth1, egress, b.objs.EgressEther) })
	if a := b.attachments(); len(a) != 1 {
		t.Errorf("attached %+v", a)
	}
	b.close()
	b.open()
	check()
	do(func() error { return putFilter(eth1, egress, b.objs.EgressEther) })
	b.close()
	remove(t, topo.Node, b.opt.Root)
	if after := chain(t, topo.Node, "eth1"); after != before {
		t.Errorf("removed: was:\n%sis:\n%s", before, after)
	}
	// The advice works.
	do(func() error { return errors.Join(netlink.QdiscDel(ingressQdisc(eth1)), netlink.QdiscAdd(clsact(eth1))) })
	b.open()
	b.apply(in)
	if got := b.attachments(); len(got) != 2 {
		t.Errorf("attached %+v", got)
	}
}
