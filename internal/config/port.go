package config

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// PortRange is an inclusive range of ports.
type PortRange struct{ First, Last uint16 }

func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// MarshalText makes JSON show the range as a user writes it.
func (r PortRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r PortRange) overlaps(o PortRange) bool { return r.First <= o.Last && o.First <= r.Last }

// ParseReservedPorts reads the kernel's form of ip_local_reserved_ports:
// "8080,9000-9100", possibly empty.
func ParseReservedPorts(text string) ([]PortRange, error) {
	var ranges []PortRange
	for item := range strings.SplitSeq(strings.TrimSpace(text), ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		r, problem := parsePorts(item, 0)
		if problem != "" {
			return nil, fmt.Errorf("reserved ports %q: %s", item, problem)
		}
		ranges = append(ranges, r)
	}
	return mergePorts(ranges), nil
}

// parsePorts reads "a" or "a-b"; problem is empty if it could.
func parsePorts(item string, lowest uint64) (r PortRange, problem string) {
	first, last, isRange := strings.Cut(item, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 32)
	b, errB := strconv.ParseUint(last, 10, 32)
	switch {
	case errA != nil || errB != nil:
		return r, "not a port or range"
	case a > 65535 || b > 65535:
		return r, "a port above 65535"
	case a < lowest || b < lowest:
		return r, "port 0 cannot be used"
	case a > b:
		return r, "the range is reversed"
	}
	return PortRange{uint16(a), uint16(b)}, ""
}

func (s setting) ports() ([]PortRange, error) {
	var ranges []PortRange
	for _, item := range s.split() {
		r, problem := parsePorts(item, 1)
		if problem != "" {
			return nil, s.refuseItem(item, problem, "write ports or ranges from 1 to 65535, for example 1024-29999,32768-65535")
		}
		ranges = append(ranges, r)
	}
	if len(ranges) == 0 {
		return nil, s.refuse("no range", "write ports or ranges from 1 to 65535, or leave the option out")
	}
	return mergePorts(ranges), nil
}

// mergePorts sorts and joins ranges that overlap or touch.
func mergePorts(ranges []PortRange) []PortRange {
	slices.SortFunc(ranges, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	var merged []PortRange
	for _, r := range ranges {
		if n := len(merged); n > 0 && int(r.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, r.Last)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}

func setPorts(field func(*Config) *[]PortRange) func(*Config, []setting) error {
	return one(func(c *Config, s setting) (err error) {
		*field(c), err = s.ports()
		return err
	})
}

// setNodePorts takes Cilium's form as well: two numbers "30000,32767" are the
// ends of one range.
func setNodePorts(c *Config, s setting) (err error) {
	if ends := s.split(); len(ends) == 2 && !strings.Contains(ends[0]+ends[1], "-") {
		s.items, s.list = []string{ends[0] + "-" + ends[1]}, true
	}
	c.NodePorts, err = s.ports()
	return err
}

// Usable tells whether every source finds ports in a pool: those below 1024 are
// for privileged sources only.
func Usable(pool []uint16) bool {
	return len(pool) > 0 && pool[len(pool)-1] >= 1024
}

// Ports returns the external ports for mappings, ascending: snat-port-range
// without node-port-range, reserved-ports and extra (ip_local_reserved_ports).
func (c Config) Ports(extra []PortRange) []uint16 {
	var taken [65536]bool
	for _, r := range slices.Concat(c.NodePorts, c.ReservedPorts, extra) {
		for p := int(r.First); p <= int(r.Last); p++ {
			taken[p] = true
		}
	}
	var ports []uint16
	for _, r := range c.SNATPorts {
		for p := int(r.First); p <= int(r.Last); p++ {
			if !taken[p] {
				ports = append(ports, uint16(p))
			}
		}
	}
	return ports
}
