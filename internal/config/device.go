package config

import (
	"slices"
	"strings"
)

// DevicePattern is one item of devices: a name, a prefix (eth+), or an exclude (!eth1).
type DevicePattern struct {
	Name    string // without ! and +
	Prefix  bool
	Exclude bool
}

// Match tells whether the pattern, exclude or not, covers the device.
func (p DevicePattern) Match(device string) bool {
	if p.Prefix {
		return strings.HasPrefix(device, p.Name)
	}
	return device == p.Name
}

func (p DevicePattern) String() string {
	text := p.Name
	if p.Exclude {
		text = "!" + text
	}
	if p.Prefix {
		text += "+"
	}
	return text
}

// MarshalText makes JSON show the pattern as the user wrote it.
func (p DevicePattern) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// DeviceFilter is a list of patterns.
type DeviceFilter []DevicePattern

// Match tells what the filter says about a device. As in Cilium the first
// pattern that matches decides; a device that none matches is neither.
func (f DeviceFilter) Match(device string) (selected, excluded bool) {
	for _, p := range f {
		if p.Match(device) {
			return !p.Exclude, p.Exclude
		}
	}
	return false, false
}

// Selects tells whether the filter names devices to use. One with only excludes
// leaves the choice among all others to auto-detection.
func (f DeviceFilter) Selects() bool {
	return slices.ContainsFunc(f, func(p DevicePattern) bool { return !p.Exclude })
}

// Names returns the devices that are named exactly, in the order given: those
// that can be missing.
func (f DeviceFilter) Names() []string {
	var names []string
	for _, p := range f {
		if _, excluded := f.Match(p.Name); !p.Prefix && !p.Exclude && !excluded {
			names = append(names, p.Name)
		}
	}
	return names
}

func (f DeviceFilter) String() string {
	texts := make([]string, len(f))
	for i, p := range f {
		texts[i] = p.String()
	}
	return strings.Join(texts, ",")
}

// same tells whether two filters mean the same: order counts only with excludes.
func (f DeviceFilter) same(g DeviceFilter) bool {
	if slices.Equal(f, g) {
		return true
	}
	subset := func(a, b DeviceFilter) bool {
		return !slices.ContainsFunc(a, func(p DevicePattern) bool { return p.Exclude || !slices.Contains(b, p) })
	}
	return subset(f, g) && subset(g, f)
}

func setDevices(field func(*Config) *DeviceFilter) func(*Config, []setting) error {
	return one(func(c *Config, s setting) error {
		var f DeviceFilter
		for _, item := range s.split() {
			p, err := s.device(item)
			if err != nil {
				return err
			}
			if !slices.Contains(f, p) {
				f = append(f, p)
			}
		}
		*field(c) = f
		return nil
	})
}

func (s setting) device(item string) (DevicePattern, error) {
	name, exclude := strings.CutPrefix(item, "!")
	name, prefix := strings.CutSuffix(name, "+")
	const maxName = 15 // IFNAMSIZ without the final zero
	switch {
	case item == auto:
		return DevicePattern{}, s.refuseItem(item, "auto stands alone", "write auto, or the devices; !name excludes from auto-detection")
	case name == "" && !prefix, name == ".", name == "..", len(name) > maxName, strings.ContainsAny(name, "/: \t\n!"):
		return DevicePattern{}, s.refuseItem(item, "not a device name", "write a name of up to 15 letters, a prefix like eth+, or an exclude like !eth1")
	}
	return DevicePattern{Name: name, Prefix: prefix, Exclude: exclude}, nil
}
