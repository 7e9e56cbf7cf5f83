// Package policytest holds the one table of cases that every rendering of a
// policy is tested against: policy.Decide, the BPF program, the iptables rules
// and explain. The table is cases.txt, which explains its own form.
package policytest

import (
	_ "embed"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/policy"
)

//go:embed cases.txt
var casesText string

// Names and indexes of devices in the table. A renderer with other indexes
// moves a group to them by Group.WithDevices.
var deviceIndex = map[string]int{"eth0": 2, "eth1": 3}

// Group is one policy and the packets to ask it about.
type Group struct {
	Name  string
	Line  int // of cases.txt
	Input policy.Input
	Cases []Case
}

// Case is one packet and what must happen to it.
type Case struct {
	Line   int    // of cases.txt
	Text   string // the line as written
	Device string // name of the egress device, for Packet.Device
	Packet policy.Packet

	// SrcPort and DstPort are ports of TCP, UDP, UDP-Lite and SCTP. For ICMP
	// echo SrcPort is the identifier; otherwise both are 0.
	SrcPort, DstPort uint16

	// Want has Address with masq-new only, and Match only where the table
	// states it. Origin is never set.
	Want policy.Decision
}

// Load returns all groups in the order of cases.txt. The slices are the caller's.
func Load() ([]Group, error) {
	return Parse("cases.txt", casesText)
}

// DeviceIndexes returns the indexes that the table uses, by device name.
func DeviceIndexes() map[string]int { return maps.Clone(deviceIndex) }

// WithDevices returns g with the device indexes replaced by name, in the input
// and in every packet.
func (g Group) WithDevices(index map[string]int) (Group, error) {
	g.Input.Devices = slices.Clone(g.Input.Devices)
	g.Cases = slices.Clone(g.Cases)
	for i, d := range g.Input.Devices {
		n, ok := index[d.Name]
		if !ok {
			return Group{}, fmt.Errorf("group %q: device %s: no index given", g.Name, d.Name)
		}
		g.Input.Devices[i].Index = n
	}
	for i, c := range g.Cases {
		n, ok := index[c.Device]
		if !ok {
			return Group{}, fmt.Errorf("cases.txt:%d: device %s: no index given", c.Line, c.Device)
		}
		g.Cases[i].Packet.Device = n
	}
	return g, nil
}

// Check returns an error that names the line if got is not what the table says.
// A renderer that can't tell the match leaves got.Match zero.
func (c Case) Check(got policy.Decision) error {
	switch {
	case got.Outcome != c.Want.Outcome:
		return fmt.Errorf("cases.txt:%d: %s: got %s (match %s)", c.Line, c.Text, got.Outcome, prefix(got.Match))
	case got.Address != c.Want.Address:
		return fmt.Errorf("cases.txt:%d: %s: got address %s", c.Line, c.Text, got.Address)
	case c.Want.Match.IsValid() && got.Match.IsValid() && got.Match != c.Want.Match:
		return fmt.Errorf("cases.txt:%d: %s: got match %s", c.Line, c.Text, got.Match)
	}
	return nil
}

func prefix(p netip.Prefix) string {
	if !p.IsValid() {
		return "none"
	}
	return p.String()
}
