package datapath

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// attachment is a device with our programs on it. Links are pinned; a clsact
// filter lives as long as its device or until it is removed.
type attachment struct {
	name     string
	index    int
	ethernet bool
	links    [3]link.Link // by direction; tcx only
	ahead    link.Link    // of a migration: the new ingress program, in front of links[ingress]
	current  [3]bool      // by direction: the link has this version's program
	filters  bool         // clsact filters of ours are, or may be, there
	whole    bool         // the last attempt left both programs on it
	moves    int          // how often the egress program was put ahead of others
	draining bool
	since    uint32 // draining: from this second of the monotonic clock on
	given    uint64 // draining: since the Apply after this one
}

func (a *attachment) release() {
	for i, l := range a.links {
		if l != nil {
			l.Close()
			a.links[i] = nil
		}
	}
	if a.ahead != nil {
		a.ahead.Close()
		a.ahead = nil
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
	sentinel // leaving too, behind all others: see sentinel.go
)

// directions in the order of attachment: the egress program comes last, so that
// replies find the way back from the first packet on.
var directions = [...]direction{ingress, egress}

// backwards are all programs in the order of detachment.
var backwards = [...]direction{sentinel, egress, ingress}

func (dir direction) String() string { return [...]string{"egress", "ingress", "sentinel"}[dir] }

func (dir direction) tcx() ebpf.AttachType {
	return [...]ebpf.AttachType{ebpf.AttachTCXEgress, ebpf.AttachTCXIngress, ebpf.AttachTCXEgress}[dir]
}

// attach puts both programs on devices, or repairs what is missing there. All
// ingress programs come before the first egress program: the reply to a flow of
// one device may arrive at another one. A device that fails is no hindrance to
// the others.
func (d *Datapath) attach(list []*attachment) error {
	if len(list) == 0 {
		return nil
	}
	if err := d.startLearning(); err != nil {
		return err
	}
	before, failed := make(map[*attachment]bool), make(map[*attachment]error)
	for _, a := range list {
		if _, before[a] = a.hook(); a.whole && !before[a] {
			d.opt.Log.Warn("programs vanished from the device, attaching them again", "device", a.name)
		}
	}
	for _, dir := range directions {
		for _, a := range list {
			if failed[a] != nil {
				continue
			}
			if err := d.attachProgram(a, dir); err != nil {
				failed[a] = fmt.Errorf("attach %s to %s: %w", dir, a.name, err)
			}
		}
	}
	var errs []error
	for _, a := range list {
		err := failed[a]
		if err == nil {
			err = d.dropOtherHook(a)
		}
		a.whole = err == nil
		if hook, ok := a.hook(); ok && !before[a] {
			d.opt.Log.Info("attached", "device", a.name, "hook", string(hook))
		}
		if err == nil {
			err = d.attachSentinel(a)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// attachProgram puts one program on a device by the hook this agent uses. A link
// that is there gets this version's program in any case, without a packet unseen.
func (d *Datapath) attachProgram(a *attachment, dir direction) error {
	prog, err := d.program(dir, a.ethernet)
	if err != nil {
		return err
	}
	if a.linked(dir) && !a.current[dir] {
		if err := a.links[dir].Update(prog); err != nil {
			return fmt.Errorf("replace the program: %w", err)
		}
		a.current[dir] = true
	}
	if d.features.Has(TCX) {
		return d.attachLink(a, dir, prog)
	}
	a.filters = true
	if err := attachTC(d.opt.Root, a, dir, prog); err != nil {
		return err
	}
	if dir == egress && a.displaced(egress) {
		return d.moveFilter(a, prog)
	}
	return nil
}

// dropOtherHook takes away what an earlier agent attached by the other hook: for a
// moment a packet passed both, and the second program knows the mark of the first.
// A clsact qdisc of ours stays, empty: with it the kernel would stop the device,
// and lose packets.
func (d *Datapath) dropOtherHook(a *attachment) error {
	if !d.features.Has(TCX) {
		d.dropLinks(a)
		return nil
	}
	if !a.filters {
		return nil
	}
	if err := deleteFilters(a.index); err != nil {
		return fmt.Errorf("detach filters from %s: %w", a.name, err)
	}
	a.filters = false
	return nil
}

// Healthy tells whether the programs are on each device that they were attached
// to, and in their place, as far as it masquerades; if not, Apply repairs it. It costs a few system
// calls a device.
func (d *Datapath) Healthy() bool {
	for _, a := range d.attached {
		if a.whole && !a.draining {
			if _, ok := a.hook(); !ok || a.displaced(egress) {
				return false
			}
			if d.opt.Sentinel && (!a.watched() || a.displaced(sentinel)) {
				return false
			}
		}
	}
	return true
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
			Ahead: programsAhead(a.index, a.links[egress]), Sentinel: a.watched()})
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
			if a.draining && a.links == [3]link.Link{} && !a.filters {
				d.opt.Log.Info("detached by others", "device", a.name)
				d.forget(a)
			}
		case errors.As(err, &notFound):
			d.opt.Log.Info("device vanished", "device", a.name)
			if err := d.deleteDevice(index); err != nil {
				d.opt.Log.Warn("device entry remains", "error", err)
			}
			d.forget(a)
			removeMark(d.opt.Root, index)
		}
	}
}

// forgetDead lets go of links and filters that are no longer on the device.
func (a *attachment) forgetDead() {
	for _, dir := range backwards {
		if a.links[dir] != nil && !a.linked(dir) {
			a.links[dir].Close()
			a.links[dir] = nil
		}
	}
	if a.filters {
		left, err := leftFilters(a.index)
		a.filters = left || err != nil
	}
}

// detach removes our programs from a device that has drained.
func (d *Datapath) detach(a *attachment) error {
	if a.filters || marked(d.opt.Root, a.index) {
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
	delete(d.attached, a.index)
}
