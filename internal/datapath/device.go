package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
)

// applyDevices tells the programs the masquerade addresses, attaches what is new
// or was removed by others, and lets devices drain that are no masquerade devices
// any more.
func (d *Datapath) applyDevices(devices []policy.Device) error {
	var errs []error
	var list []*attachment
	wanted := make(map[uint32]bool)
	for _, dev := range devices {
		wanted[uint32(dev.Index)] = true
		if err := d.putDevice(dev); err != nil {
			errs = append(errs, err)
			continue
		}
		a := d.attached[dev.Index]
		if a == nil {
			a = &attachment{index: dev.Index}
			d.attached[dev.Index] = a // also if only one direction succeeds
		}
		a.name, a.ethernet, a.draining = dev.Name, dev.Ethernet, false
		list = append(list, a)
	}
	for _, a := range d.attached {
		if a.draining && !a.whole {
			list = append(list, a) // it has not got this version's programs yet
		}
	}
	errs = append(errs, d.attach(list), d.drain(wanted))
	d.forgetGone()
	return errors.Join(errs...)
}

// drain ends new flows of the devices that are not wanted.
func (d *Datapath) drain(wanted map[uint32]bool) error {
	entries, err := d.deviceEntries()
	errs := []error{err}
	for _, index := range entries {
		if !wanted[index] {
			errs = append(errs, d.deleteDevice(int(index)))
		}
	}
	now, err := monotonicSeconds() // not before the last mapping was made
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for index, a := range d.attached {
		if !wanted[uint32(index)] && !a.draining {
			a.draining, a.since, a.given = true, now, d.applies
		}
	}
	return errors.Join(errs...)
}

func (d *Datapath) putDevice(dev policy.Device) error {
	value := masqDevice{}
	if dev.IPv4.IsValid() {
		value.Addr[0] = addrTo(dev.IPv4)
	}
	if dev.IPv6.IsValid() {
		value.Addr[1] = addrTo(dev.IPv6)
	}
	if err := d.objs.Devices.Put(uint32(dev.Index), value); err != nil {
		return fmt.Errorf("write device %s: %w", dev.Name, err)
	}
	return nil
}

func (d *Datapath) deviceEntries() ([]uint32, error) {
	var index uint32
	var value masqDevice
	var all []uint32
	it := d.objs.Devices.Iterate()
	for it.Next(&index, &value) {
		all = append(all, index)
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read devices: %w", err)
	}
	return all, nil
}

func (d *Datapath) deleteDevice(index int) error {
	if err := d.objs.Devices.Delete(uint32(index)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("remove device %d: %w", index, err)
	}
	return nil
}
