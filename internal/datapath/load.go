package datapath

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// noGeneration is control.active before the first apply.
const noGeneration = ^uint32(0)

// tableSet is where the tables of a generation are: there are two sets in turn.
func tableSet(generation uint32) uint32 { return generation % 2 }

// learnWindow is how long after the very first attach any arriving TCP packet
// counts as one of a connection opened from outside.
const learnWindow = 5 * time.Minute

// inboundShare of the flows is the size of the table of connections opened from outside.
const inboundShare = 4

// Error is an error with advice.
type Error = advice.Error

// ErrBusy says that another agent holds the root directory.
var ErrBusy = errors.New("another agent is running")

// Datapath is the loaded data plane. Its methods are for one goroutine, but for Walk.
type Datapath struct {
	opt       Options
	features  Features
	lock      *os.File
	objs      objects
	raw       rawPrograms         // empty without a device that needs them
	sentinels sentinelPrograms    // empty without Options.Sentinel
	trie      *ebpf.MapSpec       // of a policy table
	attached  map[int]*attachment // by ifindex
	handover  bool                // netfilter has some of the flows, or gets them
	taken     bool                // what an earlier agent attached has been taken over
	applied   *applied
	tunnels   []Tunnel // written; nil: not yet
	applies   uint64   // number of complete ones
	sweeper   *sweeper

	pins     string       // directory of the tables: opt.Root, or aside during a migration
	flows    uint32       // size of the tables
	old      *predecessor // what flows are to be taken over from; nil: nothing
	lastPass uint32       // of the migration: second in which the last but one began; 0: unknown
	control  sync.Mutex   // around changes of the control map

	armed, armWarned bool // expiry in the kernel: ready; not, and that was said

	// interrupt, set by tests only, is called before each write of Apply and each step of
	// a migration; an error stops there, as a crash would.
	interrupt func(step string) error
}

// Open locks opt.Root, loads the programs and maps or takes over the pinned ones,
// and puts this version's programs in the place of the attached ones. The policy
// in force stays until Apply.
func Open(opt Options) (*Datapath, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	// Kernels before 5.11 charge maps to RLIMIT_MEMLOCK; without the privilege the load says so.
	if err := rlimit.RemoveMemlock(); err != nil {
		opt.Log.Debug("keep the limit of locked memory", "error", err)
	}
	features, err := Probe()
	if err != nil {
		return nil, err
	}
	if err := prepareRoot(opt); err != nil {
		return nil, err
	}
	lock, err := lockRoot(opt.Root)
	if err != nil {
		return nil, err
	}
	d := &Datapath{opt: opt, features: features.Without(opt.Without...), lock: lock, attached: make(map[int]*attachment)}
	d.interrupt = opt.interrupt
	err = d.open()
	if err == nil && opt.Flows != 0 && d.flows != opt.Flows {
		// It went on with a migration to another size; that one is complete now.
		if err = d.unload(); err == nil {
			err = d.open()
		}
	}
	if err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

func (d *Datapath) open() error {
	if err := removeStale(d.opt.Root); err != nil {
		return err
	}
	if err := d.plan(); err != nil {
		return err
	}
	if err := d.load(); err != nil {
		return err
	}
	st, err := d.initState()
	if err != nil {
		return err
	}
	// From here on an agent is there: what the kernel does without one ends before the first walk.
	if err := d.beat(); err != nil {
		return err
	}
	d.sweeper = newSweeper(&d.objs)
	if !d.opt.Sentinel {
		if err := d.clearLeaks(); err != nil {
			return err
		}
	}
	if st.Active == noGeneration {
		// Without a policy the programs drop what should leave: whatever is attached
		// goes on with its own tables until the first Apply.
		return nil
	}
	if err := d.readHandover(st.Active); err != nil {
		return err
	}
	return d.takeOver()
}

func (d *Datapath) load() error {
	spec, err := loadMasq()
	if err != nil {
		return fmt.Errorf("read the embedded programs: %w", err)
	}
	d.size(spec)
	if err := d.features.set(spec); err != nil {
		return err
	}
	d.trie = spec.Maps[pinPolicies].InnerMap
	before, err := pinNames(d.pins)
	if err != nil {
		return err
	}
	err = spec.LoadAndAssign(&d.objs, &ebpf.CollectionOptions{Maps: ebpf.MapOptions{PinPath: d.pins}})
	if err == nil {
		// The reaper is pinned, so that `nat flush` works with the agent down.
		err = replacePin(d.objs.Reap.Pin, filepath.Join(d.pins, pinReap))
	}
	if err != nil {
		return errors.Join(loadError(d.opt.Root, err), removeNew(d.pins, before))
	}
	return nil
}

// removeNew takes away the pins of a load that failed: tables without programs
// look like a data plane.
func removeNew(root string, before []string) error {
	now, err := pinNames(root)
	for _, name := range now {
		if !slices.Contains(before, name) {
			err = errors.Join(err, os.Remove(filepath.Join(root, name)))
		}
	}
	return err
}

func loadError(root string, err error) error {
	switch {
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return incompatible(fmt.Errorf("take over the tables in %s: %w", root, err))
	case errors.Is(err, unix.EROFS):
		return rootError(err)
	case errors.Is(err, unix.EPERM), !trusted():
		return advice.New(fmt.Errorf("load the programs: %w", err), needPrivilege)
	case errors.Is(err, unix.ENOMEM):
		return advice.New(fmt.Errorf("load the programs: %w", err), "lower bpf-nat-global-max")
	}
	return advice.New(fmt.Errorf("load the programs: %w", err), noEBPF)
}

// trusted tells whether the verifier takes our programs for those of root. Else it finds fault
// with their code, and that looks like a kernel that is too old.
func trusted() bool {
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		return true
	}
	has := func(c int) bool { return caps[c/32].Effective&(1<<(c%32)) != 0 }
	return has(unix.CAP_PERFMON) || has(unix.CAP_SYS_ADMIN)
}

const (
	needPrivilege = "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON (CAP_SYS_ADMIN and CAP_SYS_RESOURCE before kernel 5.11)"
	noEBPF        = "set enable-bpf-masquerade=false to use iptables on this kernel"
)

func incompatible(err error) error {
	return advice.New(err, "another version of Bauta made them, not the previous minor one; its data plane goes on working",
		"run the version that made them, upgrade one minor version at a time, or `bauta cleanup` first (running connections end)")
}

// size sets the number of flows of new tables.
func (d *Datapath) size(spec *ebpf.CollectionSpec) {
	if d.flows == 0 {
		d.flows = spec.Maps[pinForward4].MaxEntries
	}
	for _, name := range []string{pinForward4, pinForward6, pinReverse4, pinReverse6} {
		spec.Maps[name].MaxEntries = d.flows
	}
	for _, name := range []string{pinInbound4, pinInbound6} {
		spec.Maps[name].MaxEntries = max(d.flows/inboundShare, 1)
	}
}

// Close lets go of the data plane; it stays attached and pinned. It may be called again.
func (d *Datapath) Close() error {
	if d.lock == nil {
		return nil
	}
	err := d.unload()
	d.lock.Close() // and with it the lock
	d.lock = nil
	return err
}

func (d *Datapath) unload() (err error) {
	for _, a := range d.attached {
		a.release()
	}
	clear(d.attached)
	if d.old != nil {
		d.old.close()
		if !d.old.committed && d.step("unload") == nil {
			err = discardNext(d.opt.Root)
		}
		d.old = nil
	}
	err = errors.Join(err, d.objs.Close(), d.raw.Close(), d.sentinels.Close())
	d.objs, d.raw, d.sentinels, d.tunnels = objects{}, rawPrograms{}, sentinelPrograms{}, nil
	if d.applied != nil {
		d.applied.close()
		d.applied = nil
	}
	d.taken, d.armed = false, false
	return err
}

// Features returns what the kernel offers and the data plane uses.
func (d *Datapath) Features() Features { return d.features }
