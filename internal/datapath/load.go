package datapath

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// mapLayout is MAP_LAYOUT of bpf/maps.h.
const mapLayout = 1

// noGeneration is control.active before the first apply.
const noGeneration = ^uint32(0)

// learnWindow is how long after the very first attach any arriving TCP packet
// counts as one of a connection opened from outside.
const learnWindow = 5 * time.Minute

// inboundShare of the flows is the size of the table of connections opened from outside.
const inboundShare = 4

// Error is an error with advice for the operator.
type Error struct {
	Err   error
	Hints []string
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

func hint(err error, hints ...string) error { return &Error{Err: err, Hints: hints} }

// ErrBusy says that another agent holds the root directory.
var ErrBusy = errors.New("another agent is running")

// Datapath is the loaded data plane. Its methods are for one goroutine.
type Datapath struct {
	opt      Options
	features Features
	lock     *os.File
	objs     masqObjects
	attached map[int]*attachment // by ifindex
	applied  *applied
	sweeper  *sweeper

	// interrupt, set by tests only, is called before each write of Apply; an
	// error stops there, as a crash would.
	interrupt func(step string) error
}

// Open locks opt.Root, loads the programs and maps or takes over the pinned ones,
// and puts this version's programs in the place of the attached ones. The policy
// in force stays until Apply.
func Open(opt Options) (d *Datapath, err error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	// Kernels before 5.11 charge maps to RLIMIT_MEMLOCK; without the privilege the load says so.
	if err := rlimit.RemoveMemlock(); err != nil {
		opt.Log.Debug("keep the limit of locked memory", "error", err)
	}
	if err := prepareRoot(opt); err != nil {
		return nil, err
	}
	lock, err := lockRoot(opt.Root)
	if err != nil {
		return nil, err
	}
	d = &Datapath{opt: opt, lock: lock, attached: make(map[int]*attachment)}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if d.features, err = Probe(); err != nil {
		return nil, err
	}
	if opt.NoTCX {
		d.features.TCX = false
	}
	if err := d.load(); err != nil {
		return nil, err
	}
	if err := d.initState(); err != nil {
		return nil, err
	}
	if d.sweeper, err = newSweeper(&d.objs); err != nil {
		return nil, err
	}
	if err := d.takeOver(); err != nil {
		return nil, err
	}
	return d, nil
}

func (d *Datapath) load() error {
	spec, err := loadMasq()
	if err != nil {
		return fmt.Errorf("read the embedded programs: %w", err)
	}
	if err := d.size(spec); err != nil {
		return err
	}
	if err := d.features.set(spec); err != nil {
		return err
	}
	err = spec.LoadAndAssign(&d.objs, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: d.opt.Root}})
	switch {
	case err == nil:
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return hint(fmt.Errorf("take over the tables in %s: %w", d.opt.Root, err),
			"another version of Bauta made them; its data plane goes on working",
			"run the version that made them, or `bauta cleanup` first (running connections end)")
	case errors.Is(err, unix.EPERM):
		return hint(fmt.Errorf("load the programs: %w", err), "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are needed (CAP_SYS_RESOURCE before kernel 5.11)")
	default:
		return hint(fmt.Errorf("load the programs: %w", err), "set enable-bpf-masquerade=false to use iptables on this kernel")
	}
	// The reaper is pinned, so that `nat flush` works with the agent down.
	return replacePin(d.objs.Reap.Pin, filepath.Join(d.opt.Root, pinReap))
}

// size sets the number of flows: that of the tables there are, unless another was asked for.
func (d *Datapath) size(spec *ebpf.CollectionSpec) error {
	flows := d.opt.Flows
	m, err := ebpf.LoadPinnedMap(filepath.Join(d.opt.Root, pinForward4), &ebpf.LoadPinOptions{ReadOnly: true})
	switch {
	case err == nil:
		have := m.MaxEntries()
		m.Close()
		if flows != 0 && flows != have {
			return hint(fmt.Errorf("bpf-nat-global-max: the tables in %s hold %d flows, %d were asked for", d.opt.Root, have, flows),
				fmt.Sprintf("set bpf-nat-global-max to %d or leave it out", have),
				"or run `bauta cleanup` first (running connections end)")
		}
		flows = have
	case !errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("open pinned table %s: %w", pinForward4, err)
	case flows == 0:
		flows = d.opt.DefaultFlows
	}
	if flows == 0 {
		flows = spec.Maps[pinForward4].MaxEntries
	}
	for _, name := range []string{pinForward4, pinForward6, pinReverse4, pinReverse6} {
		spec.Maps[name].MaxEntries = flows
	}
	for _, name := range []string{pinInbound4, pinInbound6} {
		spec.Maps[name].MaxEntries = max(flows/inboundShare, 1)
	}
	return nil
}

// initState fills control when its map is new, and refuses another layout.
func (d *Datapath) initState() error {
	var st masqState
	if err := d.objs.Control.Lookup(uint32(0), &st); err != nil {
		return fmt.Errorf("read control: %w", err)
	}
	if st.Layout == mapLayout {
		return nil
	}
	if st.Layout != 0 {
		return hint(fmt.Errorf("take over the tables in %s: layout %d, this version has %d", d.opt.Root, st.Layout, mapLayout),
			"run the version that made them, or `bauta cleanup` first (running connections end)")
	}
	var seed [8]byte
	rand.Read(seed[:])
	now, err := monotonicSeconds()
	if err != nil {
		return err
	}
	st = masqState{
		Active:     noGeneration,
		Layout:     mapLayout,
		LearnUntil: now + uint32(learnWindow/time.Second),
		Seed:       binary.NativeEndian.Uint64(seed[:]),
	}
	if err := d.objs.Control.Put(uint32(0), st); err != nil {
		return fmt.Errorf("write control: %w", err)
	}
	return nil
}

// Close lets go of the data plane; it stays attached and pinned.
func (d *Datapath) Close() error {
	for _, a := range d.attached {
		a.release()
	}
	err := d.objs.Close()
	if d.applied != nil {
		d.applied.close()
	}
	if d.lock != nil {
		d.lock.Close() // and with it the lock
		d.lock = nil
	}
	return err
}

// Features returns what the kernel offers and the data plane uses.
func (d *Datapath) Features() Features { return d.features }

// monotonicSeconds is the clock of the flow tables.
func monotonicSeconds() (uint32, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0, fmt.Errorf("read the monotonic clock: %w", err)
	}
	return uint32(ts.Sec), nil
}
