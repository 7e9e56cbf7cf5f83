package datapath

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

func (b *bench) healthy() (ok bool) {
	b.t.Helper()
	if err := b.ns.Do(func() error { ok = b.Healthy(); return nil }); err != nil {
		b.t.Fatal(err)
	}
	return ok
}

// What others take away is noticed, whoever looks first, and the next Apply puts
// it back.
func TestAttachRepairs(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		b.apply(in)
		index := in.Devices[0].Index
		whole := chain(t, topo.Node, "eth0")
		breakages := map[string]func() error{
			"egress":  func() error { return delFilters(index, egress) },
			"ingress": func() error { return delFilters(index, ingress) },
			"qdisc":   func() error { return netlink.QdiscDel(clsact(index)) },
		}
		if hook == HookTCX {
			breakages = map[string]func() error{
				"egress":  func() error { return detachLink(b.opt.Root, index, egress) },
				"ingress": func() error { return detachLink(b.opt.Root, index, ingress) },
				"both": func() error {
					return errors.Join(detachLink(b.opt.Root, index, egress), detachLink(b.opt.Root, index, ingress))
				},
			}
		}
		for name, breakIt := range breakages {
			if !b.healthy() {
				t.Fatalf("%s: not healthy before", name)
			}
			if err := topo.Node.Do(breakIt); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if b.healthy() {
				t.Errorf("%s: not noticed", name)
			}
			if got := b.attachments(); len(got) != 0 {
				t.Errorf("%s: attached %+v", name, got)
			}
			if b.healthy() {
				t.Errorf("%s: forgotten", name)
			}
			b.apply(in)
			if got := chain(t, topo.Node, "eth0"); !b.healthy() || got != whole {
				t.Errorf("%s: repaired:\n%swant:\n%s", name, got, whole)
			}
			if err := askAll(t, topo, topo.NodeAddr); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		// A device that is gone, or can't be attached, is no reason to look again and again.
		in.Devices = append(in.Devices, policy.Device{Name: "none", Index: 4711, Ethernet: true, IPv4: topo.NodeAddr.V4})
		if err := b.tryApply(in); !errors.Is(err, ErrAttach) || !b.healthy() {
			t.Errorf("device that is gone: %v, healthy %t", err, b.healthy())
		}
	})
}

// detachLink does what `bpftool link detach` does.
func detachLink(root string, index int, dir direction) error {
	l, err := link.LoadPinnedLink(root+"/"+pinLink(dir, index), nil)
	if err != nil {
		return err
	}
	return errors.Join(l.Detach(), l.Close())
}

// An Apply that finds everything in place makes no news: it may be a reaction to
// news itself.
func TestAttachIsSilent(t *testing.T) {
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		b := newBench(t, topo.Node, Options{Without: without})
		in := nodePolicy(t, topo)
		b.apply(in)
		err := topo.Node.Do(func() error {
			s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_TC, unix.RTNLGRP_LINK)
			if err != nil {
				return err
			}
			defer s.Close()
			buf := make([]byte, 65536)
			if err := b.tryApply(in); err != nil {
				return err
			}
			if n, _, err := unix.Recvfrom(s.GetFd(), buf, unix.MSG_DONTWAIT); !errors.Is(err, unix.EAGAIN) {
				t.Errorf("news of %d bytes, %v", n, err)
			}
			if hook == HookTCX {
				return nil
			}
			if err := errors.Join(delFilters(in.Devices[0].Index, egress), b.tryApply(in)); err != nil {
				return err
			}
			if n, _, err := unix.Recvfrom(s.GetFd(), buf, unix.MSG_DONTWAIT); err != nil || n == 0 {
				t.Errorf("no news of a repair: %v", err)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	})
}

// The ingress programs of all devices come before the first egress program, and
// the time to learn of connections begins before all of them.
func TestAttachOrder(t *testing.T) {
	t.Parallel()
	labtest.Kernel(t, labtest.TCX)
	topo := labtest.NewNode(t, lab.Options{SecondUplink: true})
	b := newBench(t, topo.Node, Options{})
	in := nodePolicy2(t, topo)
	all := in.Devices
	in.Devices = nil
	b.apply(in)
	if st, err := b.state(); err != nil || st.LearnUntil != 0 {
		t.Errorf("learning until %d without a device, %v", st.LearnUntil, err)
	}
	in.Devices = []policy.Device{{Name: "none", Index: 4711, Ethernet: true, IPv4: topo.NodeAddr.V4}}
	if err := b.tryApply(in); !errors.Is(err, ErrAttach) {
		t.Errorf("device that is gone: %v", err)
	}
	if st, err := b.state(); err != nil || st.LearnUntil == 0 {
		t.Errorf("not learning at the first attempt, %v", err)
	}
	in.Devices = all
	b.apply(in)
	var ids [2][]link.ID
	for _, a := range b.attached {
		for _, dir := range directions {
			l := a.links[dir]
			info, err := l.Info()
			if err != nil {
				t.Fatal(err)
			}
			ids[dir] = append(ids[dir], info.ID)
		}
	}
	if len(ids[egress]) != 2 || max(ids[ingress][0], ids[ingress][1]) > min(ids[egress][0], ids[egress][1]) {
		t.Errorf("links in the order of making: ingress %v, egress %v", ids[ingress], ids[egress])
	}
}
