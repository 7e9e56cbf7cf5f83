package iptables

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/policy"
)

// CheckDevice is an error for a name that would mean something else in a rule. Apply leaves
// such a device out.
func CheckDevice(name string) error {
	if name == "" || len(name) > 15 {
		return fmt.Errorf("device %q: not a name of a device", name)
	}
	for i, c := range []byte(name) {
		bad := c <= ' ' || c > '~' || slices.Contains([]byte(`"'\/`), c) || i == 0 && (c == '-' || c == '!' || c == '#')
		if bad || i == len(name)-1 && c == '+' {
			return fmt.Errorf("device %q: iptables can't match this name", name)
		}
	}
	return nil
}

// usable are the devices that rules can name; the error names the others.
func usable(devices []policy.Device) (good []policy.Device, err error) {
	var odd []string
	for _, d := range devices {
		if err := CheckDevice(d.Name); err != nil {
			odd = append(odd, err.Error())
			continue
		}
		good = append(good, d)
	}
	if len(odd) == 0 {
		return good, nil
	}
	return good, advice.New(errors.New(strings.Join(odd, "; ")), "packets leave by it with pods' addresses: rename the device, or say that this is wanted: devices=!NAME")
}
