package datapath

import (
	"errors"
	"fmt"
	"slices"
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
	links    [2]link.Link // by direction; tcx only
	filters  bool         // clsact filters of ours are, or may be, there
	draining bool
	since    uint32 // draining: from this second of the monotonic clock on
}

func (a *attachment) release() {
	for i, l := range a.links {
		if l != nil {
			l.Close()
			a.links[i] = nil
		}
	}
}

// hook is the kind of attachment that both directions have; false: they have not.
func (a *attachment) hook() (Hook, bool) {
	switch {
	case a.linked(egress) && a.linked(ingress):
		return HookTCX, true
	case a.filters && hasFilter(a.index, egress) && hasFilter(a.index, ingress):
		return HookTC, true
	}
	return "", false
}

// direction of a program on a device.
type direction int

const (
	egress direction = iota
	ingress
)

// directions in the order of attachment: the egress program comes last, so that
// replies find the way back from the first packet on.
var directions = [...]direction{ingress, egress}

func (dir direction) String() string { return [...]string{"egress", "ingress"}[dir] }

func (dir direction) tcx() ebpf.AttachType {
	return [...]ebpf.AttachType{ebpf.AttachTCXEgress, ebpf.AttachTCXIngress}[dir]
}

// attach puts both programs on dev, or repairs what is missing there.
func (d *Datapath) attach(dev policy.Device) error {
	a := d.attached[dev.Index]
	if a == nil {
		a = &attachment{index: dev.Index}
		d.attached[dev.Index] = a // also if only one direction succeeds
	}
	_, before := a.hook()
	a.name, a.ethernet, a.draining = dev.Name, dev.Ethernet, false
	if err := d.attachPrograms(a); err != nil {
		return err
	}
	if !before {
		hook, _ := a.hook()
		d.opt.Log.Info("attached", "device", a.name, "hook", string(hook))
	}
	return d.startLearning()
}

// attachPrograms makes a's programs complete, by the hook this agent uses. What
// an earlier agent attached by the other hook goes last: for a moment a packet
// passes both, and the second program knows the mark of the first.
func (d *Datapath) attachPrograms(a *attachment) error {
	for _, dir := range directions {
		prog, err := d.program(dir, a.ethernet)
		switch {
		case err != nil:
		case d.features.TCX:
			err = d.attachLink(a, dir, prog)
		default:
			a.filters = true
			err = attachTC(d.opt.Root, a, dir, prog)
		}
		if err != nil {
			return fmt.Errorf("attach %s to %s: %w", dir, a.name, err)
		}
	}
	if !d.features.TCX {
		d.dropLinks(a)
		return nil
	}
	if a.filters {
		if err := detachTC(d.opt.Root, a.index); err != nil {
			return fmt.Errorf("detach filters from %s: %w", a.name, err)
		}
		a.filters = false
	}
	return nil
}

// Attached returns the devices with our programs on them, by name, as the kernel
// knows them now.
func (d *Datapath) Attached() []Attachment {
	d.forgetGone()
	out := make([]Attachment, 0, len(d.attached))
	for _, a := range d.attached {
		hook, ok := a.hook()
		if !ok {
			continue
		}
		out = append(out, Attachment{Device: a.name, Index: a.index, Hook: hook, Draining: a.draining,
			Ahead: programsAhead(a.index, a.links[egress])})
	}
	slices.SortFunc(out, func(a, b Attachment) int { return strings.Compare(a.Device, b.Device) })
	return out
}

// forgetGone drops attachments whose device was deleted, also if another one has
// its index now: the kernel has detached the programs.
func (d *Datapath) forgetGone() {
	for index, a := range d.attached {
		dev, err := netlink.LinkByIndex(index)
		var notFound netlink.LinkNotFoundError
		switch {
		case err == nil:
			a.name = dev.Attrs().Name
			a.forgetDead()
			if a.links == [2]link.Link{} && !a.filters {
				d.opt.Log.Warn("programs vanished from the device", "device", a.name)
				d.forget(a)
			}
		case errors.As(err, &notFound):
			d.opt.Log.Info("device vanished", "device", a.name)
			if err := d.deleteDevice(index); err != nil {
				d.opt.Log.Warn("device entry remains", "error", err)
			}
			d.forget(a)
		}
	}
}

// forgetDead lets go of links and filters that are no longer on the device.
func (a *attachment) forgetDead() {
	for _, dir := range directions {
		if a.links[dir] != nil && locate(a.links[dir], dir, a.index) == linkNowhere {
			a.links[dir].Close()
			a.links[dir] = nil
		}
	}
	if a.filters {
		left, err := leftFilters(a.index)
		a.filters = left || err != nil
	}
}

// detachDrained detaches devices that are no masquerade devices any more, once no
// mapping is left that is as old as the draining. oldest is the second in which
// the oldest one was made.
func (d *Datapath) detachDrained(oldest uint32) error {
	var errs []error
	for _, a := range d.attached {
		if a.draining && int32(oldest-a.since) > 0 {
			errs = append(errs, d.detach(a))
		}
	}
	return errors.Join(errs...)
}

// detach removes our programs from a device that has drained.
func (d *Datapath) detach(a *attachment) error {
	if a.filters {
		if err := detachTC(d.opt.Root, a.index); err != nil {
			return fmt.Errorf("detach from %s: %w", a.name, err)
		}
	}
	d.opt.Log.Info("detached", "device", a.name)
	d.forget(a)
	return nil
}

func (d *Datapath) forget(a *attachment) {
	d.dropLinks(a)
	removeMark(d.opt.Root, a.index)
	delete(d.attached, a.index)
}
