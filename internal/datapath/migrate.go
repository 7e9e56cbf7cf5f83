package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"bauta.dev/bauta/internal/advice"
)

// migrate moves the flows of the data plane in root into the new tables and puts the
// new programs in the place of the old ones on these devices, under traffic:
//
//  1. All entries are copied, and once more those that spoke meanwhile.
//  2. The new ingress program goes in front of the old one on each device. A reply is
//     translated by whichever table knows its flow: the second program sees a packet
//     for a pod, and neither ends the chain.
//  3. Entries made since are copied. From here on the new tables know every connection
//     opened from outside, since the new ingress program notes these itself.
//  4. Commit: from the first new egress program on there are flows in the new tables
//     alone. A migration that ends before is undone, later it is completed.
//  5. The egress programs are replaced, device by device. A flow of the last
//     milliseconds that is not copied yet gets the same port: it depends on the inner
//     socket, the seed and the pool alone.
//  6. What the old egress programs added at the last moment is copied. They are gone,
//     so nothing is added any more; the old ingress programs go, and the pins change.
//
// Each step may be done twice.
func (d *Datapath) migrate(devices []*attachment) error {
	if !d.old.committed {
		if err := d.prepareMigration(devices); err != nil {
			return errors.Join(err, d.undoMigration(devices))
		}
	}
	if err := d.finishMigration(devices); err != nil {
		return err
	}
	d.opt.Log.Info("tables migrated", "flows", d.flows)
	d.old.close()
	d.old = nil
	return nil
}

func (d *Datapath) prepareMigration(devices []*attachment) error {
	// The old tables change least if nothing expires. (Those of layout 1 do not by themselves.)
	if err := d.beat(); err != nil {
		return err
	}
	to := d.objs.byName()
	first, err := monotonicSeconds()
	if err != nil {
		return err
	}
	// Of an attempt before this one: nothing there is in use.
	if err := d.emptyFlowTables(); err != nil {
		return err
	}
	if err := d.step("copy"); err != nil {
		return err
	}
	if err := d.copyAll(to, pass{}, flowPins...); err != nil {
		return err
	}
	second, err := monotonicSeconds()
	if err != nil {
		return err
	}
	if err := d.copyAll(to, pass{since: first - 1}, flowPins...); err != nil {
		return err
	}
	for _, a := range devices {
		if err := d.step("ingress " + a.name); err != nil {
			return err
		}
		if err := d.attachAhead(a); err != nil {
			return fmt.Errorf("attach ingress to %s: %w", a.name, err)
		}
	}
	if d.lastPass, err = monotonicSeconds(); err != nil {
		return err
	}
	if err := d.copyAll(to, pass{since: second - 1, fresh: true}, flowPins...); err != nil {
		return err
	}
	if err := d.step("commit"); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(d.pins, commitMark), 0o700); err != nil {
		return fmt.Errorf("migrate the tables: %w", err)
	}
	d.old.committed = true
	return nil
}

// copyAll is copyTo with the hint that a table too small deserves.
func (d *Datapath) copyAll(to map[string]*ebpf.Map, p pass, names ...string) error {
	err := d.old.copyTo(to, p, names...)
	if isFull(err) {
		return advice.New(fmt.Errorf("bpf-nat-global-max: %d flows are too few for the flows there are: %w", d.flows, err),
			"choose a larger one, or leave it out")
	}
	return err
}

func (d *Datapath) finishMigration(devices []*attachment) error {
	for _, a := range devices {
		if err := d.step("first " + a.name); err != nil {
			return err
		}
		if err := d.attachAhead(a); err != nil { // there already, unless this goes on after a crash
			return fmt.Errorf("attach ingress to %s: %w", a.name, err)
		}
	}
	for _, a := range devices {
		if err := d.step("egress " + a.name); err != nil {
			return err
		}
		if err := d.switchEgress(a); err != nil {
			return fmt.Errorf("attach egress to %s: %w", a.name, err)
		}
	}
	if err := d.step("rest"); err != nil {
		return err
	}
	if err := d.copyRest(); err != nil {
		return err
	}
	for _, a := range devices {
		if err := d.step("behind " + a.name); err != nil {
			return err
		}
		if err := d.dropBehind(a); err != nil {
			return fmt.Errorf("detach the old ingress program from %s: %w", a.name, err)
		}
	}
	next := d.pins
	if err := movePins(d.opt.Root, next, d.step); err != nil {
		return err
	}
	d.pins = d.opt.Root
	if err := d.step("clean"); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(next, commitMark)); err != nil {
		return fmt.Errorf("migrate the tables: %w", err)
	}
	if err := d.step("discard"); err != nil {
		return err
	}
	return discardNext(d.opt.Root)
}

// emptyFlowTables forgets what an attempt before this one has copied.
func (d *Datapath) emptyFlowTables() error {
	for i, t := range d.sweeper.tables {
		for _, m := range []*ebpf.Map{t.forward, t.reverse} {
			var err error
			if i == 0 {
				err = empty[masqTuple4, masqFlow4](m)
			} else {
				err = empty[masqTuple, masqFlow6](m)
			}
			if err != nil {
				return err
			}
		}
	}
	return errors.Join(empty[masqTuple4, masqInbound](d.objs.Inbound4), empty[masqTuple, masqInbound](d.objs.Inbound6))
}

// copyRest copies what the old programs added since the last pass, beside the new
// programs at work. The reverse halves first: they reserve the ports. A flow whose
// port another one has got meanwhile is new at its next packet.
func (d *Datapath) copyRest() error {
	to, p := d.objs.byName(), pass{since: d.lastPass, fresh: true}
	if p.since != 0 {
		p.since--
	}
	err := d.old.copyTo(to, p, pinReverse4, pinReverse6)
	for i, t := range d.sweeper.tables {
		p.keep = func(e flowEntry) bool {
			r, ok := t.find(t.reverse, e.reverseKey())
			return ok && r.xlate == e.key.local
		}
		err = errors.Join(err, d.old.copyTo(to, p, [...]string{pinForward4, pinForward6}[i]))
	}
	if isFull(err) {
		d.opt.Log.Warn("some new flows do not fit into the tables", "error", err)
		return nil
	}
	return err
}

// undoMigration takes the new programs off again. The next Apply begins anew.
func (d *Datapath) undoMigration(devices []*attachment) error {
	if err := d.step("undo"); err != nil {
		return err
	}
	var errs []error
	for _, a := range devices {
		errs = append(errs, dropAheadFilter(a.index))
		if a.ahead != nil {
			a.ahead.Detach() // an error: the device is gone
			a.ahead.Close()
			a.ahead = nil
			errs = append(errs, os.Remove(filepath.Join(d.pins, pinLink(ingress, a.index))))
		}
	}
	return errors.Join(errs...)
}

// byLink tells whether an earlier agent attached its programs by links.
func (a *attachment) byLink() bool { return a.links[ingress] != nil || a.links[egress] != nil }

// attachAhead puts the new ingress program in front of the old one, by the same hook.
func (d *Datapath) attachAhead(a *attachment) error {
	prog, err := d.program(ingress, a.ethernet)
	if err != nil {
		return err
	}
	if a.filters {
		if err := putAheadFilter(a.index, prog); err != nil {
			return err
		}
	}
	if !a.byLink() || a.ahead != nil {
		return nil
	}
	path := filepath.Join(d.pins, pinLink(ingress, a.index))
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		if locate(l, ingress, a.index) == linkHere {
			a.ahead = l
			return l.Update(prog)
		}
		l.Close()
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: a.index, Program: prog, Attach: ebpf.AttachTCXIngress, Anchor: link.Head()})
	if err != nil {
		return err
	}
	if err := replacePin(l.Pin, path); err != nil {
		l.Close()
		return err
	}
	a.ahead = l
	return nil
}

// switchEgress gives the attachments for leaving packets the new program in place.
func (d *Datapath) switchEgress(a *attachment) error {
	prog, err := d.program(egress, a.ethernet)
	if err != nil {
		return err
	}
	if a.linked(egress) {
		if err := a.links[egress].Update(prog); err != nil {
			return err
		}
		a.current[egress] = true
	}
	if a.filters {
		if own, err := ownFilters(a.index, egress); err != nil || len(own) == 0 {
			return err // nothing was there: attach completes it
		}
		return putFilter(a.index, egress, prog)
	}
	return nil
}

// dropBehind removes the old ingress program; the new one gets its place.
func (d *Datapath) dropBehind(a *attachment) error {
	if a.filters {
		prog, err := d.program(ingress, a.ethernet)
		if err != nil {
			return err
		}
		if err := settleAheadFilter(a.index, prog); err != nil {
			return err
		}
	}
	if a.ahead == nil {
		return nil
	}
	name := pinLink(ingress, a.index)
	if err := os.Rename(filepath.Join(d.pins, name), filepath.Join(d.opt.Root, name)); err != nil {
		return err
	}
	if old := a.links[ingress]; old != nil {
		old.Detach() // an error: the device is gone
		old.Close()
	}
	a.links[ingress], a.current[ingress], a.ahead = a.ahead, true, nil
	return nil
}
