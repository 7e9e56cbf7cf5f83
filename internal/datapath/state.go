package datapath

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// checkLayout refuses tables of another layout before anything is touched.
func checkLayout(root string) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(root, pinControl), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned table %s: %w", pinControl, err)
	}
	defer m.Close()
	b, err := m.LookupBytes(uint32(0))
	if err != nil {
		return fmt.Errorf("read control: %w", err)
	}
	const at = 4 // of state.layout, in every version
	if len(b) < at+4 {
		return incompatible(fmt.Errorf("take over the tables in %s: unknown layout", root))
	}
	if layout := binary.NativeEndian.Uint32(b[at:]); layout != mapLayout && layout != 0 {
		return incompatible(fmt.Errorf("take over the tables in %s: layout %d, this version has %d", root, layout, mapLayout))
	}
	return nil
}

// initState fills control when its map is new.
func (d *Datapath) initState() (masqState, error) {
	st, err := d.state()
	if err != nil || st.Layout == mapLayout {
		return st, err
	}
	var seed [8]byte
	rand.Read(seed[:])
	st = masqState{Active: noGeneration, Layout: mapLayout, Seed: binary.NativeEndian.Uint64(seed[:])}
	return st, d.setState(st)
}

func (d *Datapath) state() (st masqState, err error) {
	if err := d.objs.Control.Lookup(uint32(0), &st); err != nil {
		return st, fmt.Errorf("read control: %w", err)
	}
	return st, nil
}

func (d *Datapath) setState(st masqState) error {
	if err := d.objs.Control.Put(uint32(0), st); err != nil {
		return fmt.Errorf("write control: %w", err)
	}
	return nil
}

// startLearning opens the window in which connections that were there before us
// count as opened from outside; it begins with the very first attach.
func (d *Datapath) startLearning() error {
	st, err := d.state()
	if err != nil || st.LearnUntil != 0 {
		return err
	}
	now, err := monotonicSeconds()
	if err != nil {
		return err
	}
	st.LearnUntil = now + uint32(learnWindow/time.Second)
	return d.setState(st)
}

// monotonic is the clock of the data plane, since some moment.
func monotonic() (time.Duration, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read the monotonic clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// monotonicSeconds is the clock of the flow tables.
func monotonicSeconds() (uint32, error) {
	now, err := monotonic()
	return uint32(now / time.Second), err
}
