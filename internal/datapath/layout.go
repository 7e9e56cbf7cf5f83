package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
)

// mapLayout is MAP_LAYOUT of bpf/maps.h.
const mapLayout = 2

// formats are the layouts that can be migrated: this one, to tables of another
// size, and that of the previous minor release.
var formats = map[uint32]*format{mapLayout: &sameLayout, 1: &layout1}

// format knows what the tables of a layout hold.
type format struct {
	flow4, flow6       carrier // of the forward and reverse tables
	inbound4, inbound6 carrier
	// inherit reads what outlives the maps that are not copied; nil: they are shared.
	inherit func(control, settings *ebpf.Map) (inheritance, error)
}

// inheritance is what a data plane hands to the next one beside its flows.
type inheritance struct {
	seed       uint64
	learnUntil uint32
	guarded    [1024]uint64
}

func same[K, V any](k K, v V) (K, V) { return k, v }

var sameLayout = format{
	flow4: carry(same, viewFlow4), flow6: carry(same, viewFlow6),
	inbound4: carry(same, viewInbound4), inbound6: carry(same, viewInbound6),
}

var errShortSetting = errors.New("settings are shorter than those of their layout")

// readLayout returns the layout of the pinned tables in a directory; false: there
// are none, or none that were ever used.
func readLayout(dir string) (layout uint32, ok bool, err error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(dir, pinControl), nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, fmt.Errorf("open pinned table %s: %w", filepath.Join(dir, pinControl), err)
	}
	defer m.Close()
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		return 0, false, fmt.Errorf("read control: %w", err)
	}
	if layout, err = layoutOf(b); err != nil {
		return 0, false, incompatible(fmt.Errorf("take over the tables in %s: %w", dir, err))
	}
	return layout, layout != 0, nil
}

// layoutOf reads what is at the same place of control in every version.
func layoutOf(control []byte) (uint32, error) {
	const at = 4
	if len(control) < at+4 {
		return 0, errors.New("unknown layout")
	}
	return binary.NativeEndian.Uint32(control[at:]), nil
}
