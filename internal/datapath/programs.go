package datapath

import (
	"fmt"
	"reflect"

	"github.com/cilium/ebpf"
)

// objects are what every node needs: all maps, and the programs but for those of
// devices without a link-layer header. The verifier takes longer over a program
// than all the rest of a start.
type objects struct {
	masqMaps
	EgressEther  *ebpf.Program `ebpf:"egress_ether"`
	IngressEther *ebpf.Program `ebpf:"ingress_ether"`
	Reap         *ebpf.Program `ebpf:"reap"`
}

func (o *objects) Close() error {
	return _MasqClose(&o.masqMaps, o.EgressEther, o.IngressEther, o.Reap)
}

// byName returns the maps by their names in the embedded objects.
func (o *objects) byName() map[string]*ebpf.Map {
	all := make(map[string]*ebpf.Map)
	v := reflect.ValueOf(o.masqMaps)
	for i := range v.NumField() {
		all[v.Type().Field(i).Tag.Get("ebpf")] = v.Field(i).Interface().(*ebpf.Map)
	}
	return all
}

// rawPrograms are those of devices without a link-layer header.
type rawPrograms struct {
	Egress  *ebpf.Program `ebpf:"egress_raw"`
	Ingress *ebpf.Program `ebpf:"ingress_raw"`
}

func (r *rawPrograms) Close() error { return _MasqClose(r.Egress, r.Ingress) }

// program returns the one for a direction and kind of link header.
func (d *Datapath) program(dir direction, ethernet bool) (*ebpf.Program, error) {
	switch {
	case dir == sentinel:
		if d.sentinels.Ether == nil {
			if err := d.loadMore(&d.sentinels); err != nil {
				return nil, err
			}
		}
		return d.sentinels.of(ethernet), nil
	case dir == egress && ethernet:
		return d.objs.EgressEther, nil
	case ethernet:
		return d.objs.IngressEther, nil
	}
	if d.raw.Egress == nil {
		if err := d.loadMore(&d.raw); err != nil {
			return nil, err
		}
	}
	if dir == egress {
		return d.raw.Egress, nil
	}
	return d.raw.Ingress, nil
}

// loadMore loads programs that not every node needs; they use the same maps.
func (d *Datapath) loadMore(to any) error {
	spec, err := d.specForMaps()
	if err != nil {
		return err
	}
	if err := spec.LoadAndAssign(to, &ebpf.CollectionOptions{MapReplacements: d.objs.byName()}); err != nil {
		return loadError(d.opt.Root, err)
	}
	return nil
}

// specForMaps is the embedded object, to load programs of it for the maps there are.
func (d *Datapath) specForMaps() (*ebpf.CollectionSpec, error) {
	spec, err := loadMasq()
	if err != nil {
		return nil, fmt.Errorf("read the embedded programs: %w", err)
	}
	for name, m := range d.objs.byName() {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	return spec, d.features.set(spec)
}
