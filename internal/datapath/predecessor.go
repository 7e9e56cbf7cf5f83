package datapath

import (
	"errors"
	"fmt"
	"math/bits"
	"os"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/advice"
)

// nextDir, below the root, holds the pins of a data plane that is about to take the
// place of the one in root. Without commitMark in it, it can be thrown away at any
// time; with it, it may have flows that root's tables lack.
const (
	nextDir    = "next"
	commitMark = "committed"
)

// flowPins are the tables whose size is an option.
var flowPins = []string{pinForward4, pinForward6, pinReverse4, pinReverse6, pinInbound4, pinInbound6}

// predecessor is the data plane that a migration moves away from. Its programs stay
// attached, with its tables, until all flows are in the new ones.
type predecessor struct {
	inheritance
	format    *format
	tables    map[string]*ebpf.Map // by flowPins
	committed bool
}

// plan decides where the pins of the tables to work with are, and how large these
// are: what is pinned, or new ones aside that are going to take over from them.
func (d *Datapath) plan() error {
	root, next := d.opt.Root, filepath.Join(d.opt.Root, nextDir)
	d.pins, d.flows = root, d.opt.Flows
	if d.flows == 0 {
		d.flows = d.opt.DefaultFlows
	}
	committed, err := isCommitted(root)
	if err != nil {
		return err
	}
	if !committed {
		if err := discardNext(root); err != nil {
			return err
		}
	}
	layout, ok, err := readLayout(root)
	if err != nil || !ok {
		return err
	}
	if committed {
		return d.resume(layout, next)
	}
	have, err := pinnedFlows(root)
	if errors.Is(err, os.ErrNotExist) && layout == mapLayout {
		return nil // the pin was lost: the table is made anew beside the others
	}
	if err != nil {
		return err
	}
	if d.opt.Flows == 0 {
		d.flows = have
	}
	if layout == mapLayout && d.flows == have {
		return nil
	}
	if d.old, err = openPredecessor(root, layout); err != nil {
		return err
	}
	if err := d.old.fits(d.flows); err != nil {
		return err
	}
	d.opt.Log.Info("migrating the tables", "layout", layout, "to", mapLayout, "flows", have, "to_flows", d.flows)
	if err := os.Mkdir(next, 0o700); err != nil {
		return fmt.Errorf("migrate the tables: %w", err)
	}
	d.pins = next
	if layout == mapLayout {
		return sharePins(root, next)
	}
	return nil
}

// resume goes on with a migration that was under way when an agent ended.
func (d *Datapath) resume(layout uint32, next string) error {
	to, _, err := readLayout(next)
	if err != nil {
		return err
	}
	if to != mapLayout {
		return advice.New(fmt.Errorf("%s: a migration to tables of layout %d was interrupted, this version has %d", d.opt.Root, to, mapLayout),
			"start the version that began it once; its data plane goes on working")
	}
	if d.flows, err = pinnedFlows(next); err != nil {
		return err
	}
	if d.old, err = openPredecessor(d.opt.Root, layout); err != nil {
		return err
	}
	if err := removeStale(next); err != nil {
		return err
	}
	d.opt.Log.Info("going on with an interrupted migration of the tables", "layout", layout, "to", to, "to_flows", d.flows)
	d.old.committed, d.pins = true, next
	return nil
}

func pinnedFlows(dir string) (uint32, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinForward4), nil)
	if err != nil {
		return 0, fmt.Errorf("open pinned table %s: %w", pinForward4, err)
	}
	defer m.Close()
	return m.MaxEntries(), nil
}

// openPredecessor opens the tables in root, if this version knows their layout.
func openPredecessor(root string, layout uint32) (p *predecessor, err error) {
	p = &predecessor{format: formats[layout], tables: make(map[string]*ebpf.Map)}
	if p.format == nil {
		return nil, incompatible(fmt.Errorf("take over the tables in %s: layout %d, this version has %d", root, layout, mapLayout))
	}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	open := func(name string) (*ebpf.Map, error) {
		m, err := ebpf.LoadPinnedMap(filepath.Join(root, name), nil)
		if err != nil {
			return nil, fmt.Errorf("open pinned table %s: %w", name, err)
		}
		return m, nil
	}
	for _, name := range flowPins {
		if p.tables[name], err = open(name); err != nil {
			delete(p.tables, name)
			return nil, err
		}
	}
	if p.format.inherit == nil {
		return p, nil
	}
	control, err := open(pinControl)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	settings, err := open(pinSettings)
	if err != nil {
		return nil, err
	}
	defer settings.Close()
	if p.inheritance, err = p.format.inherit(control, settings); err != nil {
		return nil, fmt.Errorf("read the policy of layout %d: %w", layout, err)
	}
	return p, nil
}

func (p *predecessor) close() {
	for _, m := range p.tables {
		m.Close()
	}
}

func (p *predecessor) carrier(name string) carrier {
	switch name {
	case pinForward4, pinReverse4:
		return p.format.flow4
	case pinForward6, pinReverse6:
		return p.format.flow6
	case pinInbound4:
		return p.format.inbound4
	}
	return p.format.inbound6
}

// fits returns an Error unless the entries there are go into tables for flows.
func (p *predecessor) fits(flows uint32) error {
	most := 0
	for _, name := range flowPins {
		used, share := 0, 1
		err := p.carrier(name)(p.tables[name], nil, pass{keep: func(flowEntry) bool { used++; return false }})
		if err != nil {
			return err
		}
		if name == pinInbound4 || name == pinInbound6 {
			share = inboundShare
		}
		most = max(most, used*share)
	}
	if most <= int(flows) {
		return nil
	}
	return advice.New(fmt.Errorf("bpf-nat-global-max: %d flows were asked for, but the tables need room for %d", flows, most),
		fmt.Sprintf("set bpf-nat-global-max to %d or more, or leave it out", 1<<bits.Len(uint(most-1))),
		"the data plane that is there goes on working")
}

// copyTo copies entries into the new tables, in the order of names.
func (p *predecessor) copyTo(to map[string]*ebpf.Map, what pass, names ...string) error {
	for _, name := range names {
		if same, err := sameMap(p.tables[name], to[name]); err != nil || same {
			if err != nil {
				return err
			}
			continue // an interrupted migration had got that far
		}
		if err := p.carrier(name)(p.tables[name], to[name], what); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func sameMap(a, b *ebpf.Map) (bool, error) {
	x, err1 := a.Info()
	y, err2 := b.Info()
	if err := errors.Join(err1, err2); err != nil {
		return false, err
	}
	i, _ := x.ID()
	j, _ := y.ID()
	return i == j, nil
}

func isCommitted(root string) (bool, error) {
	_, err := os.Stat(filepath.Join(root, nextDir, commitMark))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// sharePins gives the tables that stay as they are a second pin in next.
func sharePins(root, next string) error {
	names, err := pinNames(root)
	if err != nil {
		return err
	}
	for _, name := range names {
		if slices.Contains(flowPins, name) || attachmentPin(name) {
			continue
		}
		if err := os.Link(filepath.Join(root, name), filepath.Join(next, name)); err != nil {
			return fmt.Errorf("pin %s: %w", name, err)
		}
	}
	return nil
}

// movePins gives everything in next its place in root, and removes what the
// predecessor alone had there.
func movePins(root, next string, step func(string) error) error {
	names, err := pinNames(next)
	if err != nil {
		return err
	}
	before, err := pinNames(root)
	if err != nil {
		return err
	}
	// Control last: it says which layout the tables have.
	slices.SortStableFunc(names, func(a, b string) int { return isControl(a) - isControl(b) })
	for _, name := range names {
		if attachmentPin(name) {
			continue // of a device that has gone meanwhile
		}
		if err := step("pin " + name); err != nil {
			return err
		}
		if isControl(name) == 1 {
			for _, old := range before {
				if !slices.Contains(names, old) && !attachmentPin(old) {
					if err := os.Remove(filepath.Join(root, old)); err != nil {
						return fmt.Errorf("remove pin: %w", err)
					}
				}
			}
		}
		if err := linkPin(filepath.Join(next, name), filepath.Join(root, name)); err != nil {
			return fmt.Errorf("pin %s: %w", name, err)
		}
	}
	return nil
}

func isControl(name string) int {
	if name == pinControl {
		return 1
	}
	return 0
}

// linkPin gives a pin a second name, over what has it.
func linkPin(from, to string) error {
	a, err := os.Stat(from)
	if err != nil {
		return err
	}
	if b, err := os.Stat(to); err == nil && os.SameFile(a, b) {
		return nil // a rename would do nothing and leave both
	}
	if err := os.Link(from, to+newSuffix); err != nil {
		return err
	}
	return os.Rename(to+newSuffix, to)
}

// discardNext removes what a migration left that is over, or had not got far: the
// programs that it put in front of the others first.
func discardNext(root string) error {
	next := filepath.Join(root, nextDir)
	names, err := os.ReadDir(next)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bpf-root: %w", err)
	}
	devices, err := listDevices()
	if err != nil {
		return err
	}
	for _, dev := range devices {
		if err := dropAheadFilter(dev.Attrs().Index); err != nil {
			return err
		}
	}
	for _, e := range names {
		if err := removePin(filepath.Join(next, e.Name())); err != nil {
			return err
		}
	}
	if err := os.Remove(next); err != nil {
		return fmt.Errorf("remove %s: %w", next, err)
	}
	return nil
}
