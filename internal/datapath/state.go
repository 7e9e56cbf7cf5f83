package datapath

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// initState fills control when its map is new.
func (d *Datapath) initState() (masqState, error) {
	st, err := d.state()
	if err != nil || st.Layout == mapLayout {
		return st, err
	}
	var seed [8]byte
	rand.Read(seed[:])
	st = masqState{Active: noGeneration, Layout: mapLayout, Seed: binary.NativeEndian.Uint64(seed[:])}
	if d.old != nil {
		st.Seed, st.LearnUntil = d.old.seed, d.old.learnUntil
	}
	return st, d.changeState(func(now *masqState) { *now = st })
}

func (d *Datapath) state() (st masqState, err error) {
	if err := d.objs.Control.Lookup(uint32(0), &st); err != nil {
		return st, fmt.Errorf("read control: %w", err)
	}
	return st, nil
}

// changeState changes control. Walk does so in a goroutine of its own.
func (d *Datapath) changeState(change func(*masqState)) error {
	d.control.Lock()
	defer d.control.Unlock()
	st, err := d.state()
	if err != nil {
		return err
	}
	change(&st)
	if err := d.objs.Control.Put(uint32(0), st); err != nil {
		return fmt.Errorf("write control: %w", err)
	}
	return nil
}

// beat says that the agent takes care of expired flows.
func (d *Datapath) beat() error {
	now, err := monotonicSeconds()
	if err != nil {
		return err
	}
	return d.changeState(func(st *masqState) { st.Heartbeat = now })
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
	return d.changeState(func(st *masqState) { st.LearnUntil = now + uint32(learnWindow/time.Second) })
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
