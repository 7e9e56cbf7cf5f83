package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Attachments returns the devices of this network namespace with our programs on
// them, as the kernel knows them, with the programs that run before ours at egress.
func (i *Inspector) Attachments() ([]Attachment, error) {
	devices, err := listDevices()
	if err != nil {
		return nil, err
	}
	var out []Attachment
	for _, dev := range devices {
		index := dev.Attrs().Index
		a := &attachment{index: index, filters: true}
		for _, dir := range backwards {
			a.links[dir], _ = link.LoadPinnedLink(filepath.Join(i.root, pinLink(dir, index)), nil)
		}
		if hook, ok := a.hook(); ok {
			entry, err := i.maps[pinDevices].LookupBytes(uint32(index))
			draining := err != nil || entry == nil
			out = append(out, Attachment{Device: dev.Attrs().Name, Index: index, Hook: hook, Draining: draining,
				Ahead: programsAhead(index, a.links[egress]), Sentinel: a.watched()})
		}
		a.release()
	}
	slices.SortFunc(out, func(a, b Attachment) int { return strings.Compare(a.Device, b.Device) })
	return out, nil
}

// programsAhead names the foreign programs that see a leaving packet before ours:
// own is our link, nil if we have a filter.
func programsAhead(index int, own link.Link) []string {
	var ahead []string
	var ownID link.ID
	if own != nil {
		if info, err := own.Info(); err == nil {
			ownID = info.ID
		}
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXEgress})
	if err == nil {
		for _, p := range res.Programs {
			if id, ok := p.LinkID(); ok && id == ownID {
				return ahead
			}
			ahead = append(ahead, programName(p.ID))
		}
	}
	filters, err := listFilters(index, egress)
	if err != nil || own != nil {
		return ahead
	}
	for _, f := range filters {
		if isOwnFilter(f, egress) {
			return ahead
		}
		name := f.Type() + " filter"
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name != "" {
			name += " " + b.Name
		}
		ahead = append(ahead, fmt.Sprintf("%s, priority %d", name, f.Attrs().Priority))
	}
	return ahead
}

// programName is best effort: opening a program by ID needs CAP_SYS_ADMIN.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Sprintf("program %d", id)
	}
	defer p.Close()
	info, err := p.Info()
	if err != nil || info.Name == "" {
		return fmt.Sprintf("program %d", id)
	}
	return info.Name
}

// Remove takes the data plane away: programs off the devices of this network
// namespace, pins, tables, and the directory if nobody else has anything in it.
// Removing what is not there is no error. It returns what it removed, for people
// to read. ErrBusy: an agent holds root.
func Remove(root string) (removed []string, err error) {
	onBPF := false
	if _, err := os.Stat(root); err == nil {
		if onBPF, err = isBPFFS(root); err != nil {
			return nil, err
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return nil, rootError(err)
	}
	if onBPF {
		lock, err := lockRoot(root)
		if err != nil {
			return nil, err
		}
		defer lock.Close()
	}
	if onBPF {
		if err := os.Remove(filepath.Join(root, nextDir, commitMark)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, rootError(err)
		}
		if err := discardNext(root); err != nil {
			return nil, err
		}
	}
	// Filters also when the directory is gone: they live without it.
	if removed, err = removeFilters(root); err != nil || !onBPF {
		return removed, err
	}
	names, err := pinNames(root)
	if err != nil {
		return removed, err
	}
	// Links first, so that no program runs without what it needs.
	slices.SortStableFunc(names, func(a, b string) int { return pinRank(a) - pinRank(b) })
	for _, name := range names {
		if err := removePin(filepath.Join(root, name)); err != nil {
			return removed, err
		}
		removed = append(removed, name)
	}
	switch err := os.Remove(root); {
	case err == nil:
		return append(removed, root), nil
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.ENOTEMPTY), errors.Is(err, os.ErrNotExist):
		return removed, nil // a mount point, or shared with others
	default:
		return removed, fmt.Errorf("remove %s: %w", root, err)
	}
}

// removePin removes a pin; a link is detached before, since the kernel would do it
// only some time later.
func removePin(path string) error {
	if _, _, ok := parsePinLink(filepath.Base(path)); ok {
		if l, err := link.LoadPinnedLink(path, nil); err == nil {
			l.Detach() // an error: the device is gone
			l.Close()
		}
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove pin: %w", err)
	}
	return nil
}

func pinRank(name string) int {
	switch dir, _, ok := parsePinLink(name); {
	case ok && dir == sentinel:
		return 0
	case ok:
		return 1
	}
	return 2
}

func removeFilters(root string) ([]string, error) {
	devices, err := listDevices()
	if err != nil {
		return nil, err
	}
	var removed []string
	for _, dev := range devices {
		index := dev.Attrs().Index
		left, err := leftFilters(index)
		if err != nil {
			return removed, err
		}
		what := "tc filters of "
		switch {
		case left:
		case marked(root, index):
			what = "clsact qdisc of " // our filters went before
		default:
			continue
		}
		if err := detachTC(root, index); err != nil {
			return removed, fmt.Errorf("detach from %s: %w", dev.Attrs().Name, err)
		}
		removed = append(removed, what+dev.Attrs().Name)
	}
	return removed, nil
}
