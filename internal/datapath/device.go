package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
)

// applyDevices attaches what is new, tells the programs the masquerade
// addresses, and lets devices drain that are no masquerade devices any more.
func (d *Datapath) applyDevices(devices []policy.Device) error {
	now, err := monotonicSeconds()
	if err != nil {
		return err
	}
	var errs []error
	wanted := make(map[uint32]bool)
	for _, dev := range devices {
		wanted[uint32(dev.Index)] = true
		if err := d.putDevice(dev); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := d.attach(dev); err != nil {
			errs = append(errs, err)
		}
	}
	gone, err := d.deviceEntries()
	errs = append(errs, err)
	for _, index := range gone {
		if !wanted[index] {
			errs = append(errs, d.deleteDevice(int(index)))
		}
	}
	for index, a := range d.attached {
		if !wanted[uint32(index)] && !a.draining {
			a.draining, a.since = true, now
		}
	}
	d.forgetGone()
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
