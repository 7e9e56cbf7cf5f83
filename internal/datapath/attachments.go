package datapath

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// Attachments returns the devices of this network namespace with our programs on
// them, as the kernel knows them, with the programs that run before ours at egress.
func (i *Inspector) Attachments() ([]Attachment, error) {
	devices, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var out []Attachment
	for _, dev := range devices {
		index := dev.Attrs().Index
		a := Attachment{Device: dev.Attrs().Name, Index: index}
		switch {
		case i.linked(index, egress) && i.linked(index, ingress):
			a.Hook = HookTCX
		case hasFilter(index, egress) && hasFilter(index, ingress):
			a.Hook = HookTC
		default:
			continue
		}
		var value masqDevice
		a.Draining = i.maps[pinDevices].Lookup(uint32(index), &value) != nil
		a.Ahead = programsAhead(index, a.Hook)
		out = append(out, a)
	}
	slices.SortFunc(out, func(a, b Attachment) int { return strings.Compare(a.Device, b.Device) })
	return out, nil
}

// linked tells whether our pinned link is attached to the device with that index.
func (i *Inspector) linked(index int, dir direction) bool {
	l, err := link.LoadPinnedLink(filepath.Join(i.root, pinLink(dir, index)), &ebpf.LoadPinOptions{})
	if err != nil {
		return false
	}
	defer l.Close()
	info, err := l.Info()
	return err == nil && info.TCX() != nil && int(info.TCX().Ifindex) == index
}

// programsAhead names the foreign programs that see a leaving packet before ours.
func programsAhead(index int, hook Hook) []string {
	var ahead []string
	res, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: ebpf.AttachTCXEgress})
	if err == nil {
		for _, p := range res.Programs {
			name := programName(p.ID)
			if strings.HasPrefix(name, "egress_") && hook == HookTCX {
				return ahead
			}
			ahead = append(ahead, name)
		}
	}
	if hook == HookTCX {
		return ahead
	}
	filters, err := netlink.FilterList(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}, filterParent(egress))
	if err != nil {
		return ahead
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == filterName(egress) {
			return ahead
		}
		ahead = append(ahead, fmt.Sprintf("%s filter, priority %d", f.Type(), f.Attrs().Priority))
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

// Remove takes the data plane away: programs off the devices, pins, tables.
// Removing what is not there is no error. It returns what it removed, for people
// to read. ErrBusy: an agent holds root.
func Remove(root string) ([]string, error) {
	if _, err := os.Stat(root); os.IsNotExist(err) {
		return nil, nil
	}
	lock, err := lockRoot(root)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	var removed []string
	devices, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	for _, dev := range devices {
		index := dev.Attrs().Index
		if !hasFilter(index, egress) && !hasFilter(index, ingress) {
			continue
		}
		if err := detachTC(root, index); err != nil {
			return removed, fmt.Errorf("detach from %s: %w", dev.Attrs().Name, err)
		}
		removed = append(removed, "tc filters of "+dev.Attrs().Name)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return removed, fmt.Errorf("bpf-root: %w", err)
	}
	// Links first: removing the last reference of a pinned link detaches its program. Egress
	// before ingress would let replies of mapped flows hang; the other way round they would
	// reach the node, so neither is better than doing it quickly.
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(root, e.Name())); err != nil {
			return removed, fmt.Errorf("remove pin: %w", err)
		}
		removed = append(removed, e.Name())
	}
	if err := os.Remove(root); err != nil {
		return removed, fmt.Errorf("remove %s: %w", root, err)
	}
	return append(removed, root), nil
}
