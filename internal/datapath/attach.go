package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"bauta.dev/bauta/internal/policy"
)

// attachment is a device with our programs on it. Links are pinned; a clsact
// filter lives as long as its device or until it is removed.
type attachment struct {
	name     string
	index    int
	ethernet bool
	hook     Hook
	links    [2]link.Link // egress, ingress; tcx only
	draining bool
}

func (a *attachment) release() {
	for _, l := range a.links {
		if l != nil {
			l.Close()
		}
	}
}

// direction of a program on a device.
type direction int

const (
	egress direction = iota
	ingress
)

func (dir direction) String() string { return [...]string{"egress", "ingress"}[dir] }

func (dir direction) tcx() ebpf.AttachType {
	return [...]ebpf.AttachType{ebpf.AttachTCXEgress, ebpf.AttachTCXIngress}[dir]
}

func pinLink(dir direction, index int) string { return fmt.Sprintf("%s_%d", dir, index) }

// program returns the one for a direction and kind of link header.
func (d *Datapath) program(dir direction, ethernet bool) *ebpf.Program {
	switch {
	case dir == egress && ethernet:
		return d.objs.EgressEther
	case dir == egress:
		return d.objs.EgressRaw
	case ethernet:
		return d.objs.IngressEther
	}
	return d.objs.IngressRaw
}

// attach puts both programs on dev, or repairs what is missing there: the egress
// program last, so that replies find the way back from the first packet on.
func (d *Datapath) attach(dev policy.Device) error {
	a := d.attached[dev.Index]
	if a == nil {
		a = &attachment{index: dev.Index, hook: HookTC, ethernet: dev.Ethernet}
		if d.features.TCX {
			a.hook = HookTCX
		}
	}
	a.name, a.draining = dev.Name, false
	for _, dir := range []direction{ingress, egress} {
		if err := d.attachProgram(a, dir); err != nil {
			return fmt.Errorf("attach %s to %s: %w", dir, dev.Name, err)
		}
	}
	if d.attached[dev.Index] == nil {
		d.attached[dev.Index] = a
		d.opt.Log.Info("attached", "device", a.name, "hook", string(a.hook))
	}
	return nil
}

func (d *Datapath) attachProgram(a *attachment, dir direction) error {
	prog := d.program(dir, a.ethernet)
	if a.hook == HookTC {
		return attachTC(d.opt.Root, a, dir, prog)
	}
	if a.links[dir] != nil {
		if info, err := a.links[dir].Info(); err == nil && int(info.TCX().Ifindex) == a.index {
			return nil
		}
		a.links[dir].Close()
		a.links[dir] = nil
	}
	// First of the chain: a program ahead of us could end it.
	l, err := link.AttachTCX(link.TCXOptions{Interface: a.index, Program: prog, Attach: dir.tcx(), Anchor: link.Head()})
	if err != nil {
		return err
	}
	if err := replacePin(l.Pin, filepath.Join(d.opt.Root, pinLink(dir, a.index))); err != nil {
		l.Close()
		return err
	}
	a.links[dir] = l
	return nil
}

// takeOver finds the attachments that an earlier agent left and gives them this
// version's programs: by a link update or by replacing the filter in place, so
// that no packet passes unseen.
func (d *Datapath) takeOver() error {
	if err := d.takeOverLinks(); err != nil {
		return err
	}
	devices, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list devices: %w", err)
	}
	for _, dev := range devices {
		if d.attached[dev.Attrs().Index] != nil {
			continue
		}
		if !hasFilter(dev.Attrs().Index, egress) && !hasFilter(dev.Attrs().Index, ingress) {
			continue
		}
		a := &attachment{name: dev.Attrs().Name, index: dev.Attrs().Index, hook: HookTC, ethernet: isEthernet(dev), draining: true}
		for _, dir := range []direction{ingress, egress} {
			if err := attachTC(d.opt.Root, a, dir, d.program(dir, a.ethernet)); err != nil {
				return fmt.Errorf("replace the %s program of %s: %w", dir, a.name, err)
			}
		}
		d.attached[a.index] = a
	}
	return nil
}

func (d *Datapath) takeOverLinks() error {
	entries, err := os.ReadDir(d.opt.Root)
	if err != nil {
		return fmt.Errorf("bpf-root: %w", err)
	}
	for _, e := range entries {
		dir, index, ok := parsePinLink(e.Name())
		if !ok {
			continue
		}
		path := filepath.Join(d.opt.Root, e.Name())
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", e.Name(), err)
		}
		dev, err := netlink.LinkByIndex(index)
		info, ierr := l.Info()
		if err != nil || ierr != nil || int(info.TCX().Ifindex) != index {
			// The device is gone, and the kernel has detached the link.
			l.Close()
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("remove pin of a vanished device: %w", err)
			}
			continue
		}
		a := d.attached[index]
		if a == nil {
			a = &attachment{name: dev.Attrs().Name, index: index, hook: HookTCX, ethernet: isEthernet(dev), draining: true}
			d.attached[index] = a
		}
		a.links[dir] = l
		if err := l.Update(d.program(dir, a.ethernet)); err != nil {
			return fmt.Errorf("replace the %s program of %s: %w", dir, a.name, err)
		}
	}
	return nil
}

func parsePinLink(name string) (direction, int, bool) {
	for _, dir := range []direction{egress, ingress} {
		if s, ok := strings.CutPrefix(name, dir.String()+"_"); ok {
			index, err := strconv.Atoi(s)
			return dir, index, err == nil
		}
	}
	return 0, 0, false
}

func isEthernet(l netlink.Link) bool {
	return l.Attrs().EncapType == "ether" || l.Attrs().EncapType == "loopback"
}

// Attached returns the devices with our programs on them, by name.
func (d *Datapath) Attached() []Attachment {
	out := make([]Attachment, 0, len(d.attached))
	for _, a := range d.attached {
		out = append(out, Attachment{Device: a.name, Index: a.index, Hook: a.hook, Draining: a.draining})
	}
	slices.SortFunc(out, func(a, b Attachment) int { return strings.Compare(a.Device, b.Device) })
	return out
}

// forgetGone drops attachments whose device was deleted; the kernel has detached them.
func (d *Datapath) forgetGone() {
	for index, a := range d.attached {
		dev, err := netlink.LinkByIndex(index)
		if err == nil {
			a.name = dev.Attrs().Name
			continue
		}
		var notFound netlink.LinkNotFoundError
		if !errors.As(err, &notFound) {
			continue
		}
		d.opt.Log.Info("device vanished", "device", a.name)
		d.forget(a)
	}
}

// detach removes our programs from a device that has drained.
func (d *Datapath) detach(a *attachment) error {
	if a.hook == HookTC {
		if err := detachTC(d.opt.Root, a.index); err != nil {
			return fmt.Errorf("detach from %s: %w", a.name, err)
		}
	}
	d.forget(a)
	d.opt.Log.Info("detached", "device", a.name)
	return nil
}

func (d *Datapath) forget(a *attachment) {
	for _, dir := range []direction{egress, ingress} {
		if a.links[dir] != nil {
			a.links[dir].Unpin()
		}
		os.Remove(filepath.Join(d.opt.Root, pinLink(dir, a.index)))
	}
	os.Remove(markQdisc(d.opt.Root, a.index))
	a.release()
	delete(d.attached, a.index)
}
