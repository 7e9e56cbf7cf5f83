package datapath

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

const bpffsHome = "/sys/fs/bpf"

// initPIDNamespace is the inode of the first PID namespace (linux/proc_ns.h); in
// it, process 1 is the host's.
const initPIDNamespace = "pid:[4026531836]"

// mount is a line of mountinfo. The number is unique on the machine: two mount
// namespaces have none in common.
type mount struct{ number, device, point string }

func parseMounts(mountinfo string) []mount {
	var mounts []mount
	for line := range strings.Lines(mountinfo) {
		if f := strings.Fields(line); len(f) >= 6 {
			mounts = append(mounts, mount{f[0], f[2], unescapeMount.Replace(f[4])})
		}
	}
	return mounts
}

// unescapeMount undoes what the kernel does to a mount point.
var unescapeMount = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// place says where a mount namespace is, seen from the host.
type place int

const (
	placeUnknown   place = iota // in a container: process 1 is not the host's
	placeHost                   // the host's own mount namespace
	placeElsewhere              // another one, and the host's can be seen
)

// mountTable is what decides whether pins outlive this mount namespace.
type mountTable struct {
	place      place
	self, host []mount // host: only with placeElsewhere
}

func readMountTable() (mountTable, error) {
	// Not /proc/self, which is the main thread: a thread can have a namespace of its own.
	own, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return mountTable{}, fmt.Errorf("read mounts: %w", err)
	}
	t := mountTable{self: parseMounts(string(own))}
	if pid, err := os.Readlink("/proc/self/ns/pid"); err != nil || pid != initPIDNamespace {
		return t, nil
	}
	host, err := os.ReadFile("/proc/1/mountinfo")
	if err != nil {
		return t, nil
	}
	t.host, t.place = parseMounts(string(host)), placeElsewhere
	for _, m := range t.self {
		if slices.ContainsFunc(t.host, func(h mount) bool { return h.number == m.number }) {
			t.place = placeHost
		}
	}
	return t, nil
}

// at is the mount that path is on: of several at one point the last one.
func (t mountTable) at(path string) (best mount) {
	path = filepath.Clean(path)
	for _, m := range t.self {
		inside := m.point == "/" || m.point == path || strings.HasPrefix(path, m.point+"/")
		if inside && len(m.point) >= len(best.point) {
			best = m
		}
	}
	return best
}

// private tells whether what is mounted at path certainly ends with this mount
// namespace: the host has no mount of that file system. In a container a bpffs
// was given from outside, since the agent mounts none there.
func (t mountTable) private(path string) bool {
	m := t.at(path)
	return t.place == placeElsewhere && !slices.ContainsFunc(t.host, func(h mount) bool { return h.device == m.device })
}

func isBPFFS(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, fmt.Errorf("statfs %s: %w", path, err)
	}
	return st.Type == unix.BPF_FS_MAGIC, nil
}

// mountBPFFS mounts a bpffs at its usual place, in the host's mount namespace
// only: anywhere else the pins would vanish with the namespace.
func mountBPFFS(opt Options, t mountTable) error {
	notMounted := fmt.Errorf("bpf-root %s: not on a bpffs", opt.Root)
	if !strings.HasPrefix(filepath.Clean(opt.Root)+"/", bpffsHome+"/") {
		return advice.New(notMounted, "choose a directory below "+bpffsHome, "or mount one: mount -t bpf bpf DIR")
	}
	if t.place != placeHost && !opt.AllowPrivateBPFFS {
		return advice.New(notMounted, "mount it on the host (mount -t bpf bpf "+bpffsHome+") and into the container",
			"the agent mounts it only in the host's mount namespace")
	}
	if err := unix.Mount("bpf", bpffsHome, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return advice.New(fmt.Errorf("mount bpffs on %s: %w", bpffsHome, err), "as root: mount -t bpf bpf "+bpffsHome)
	}
	opt.Log.Info("mounted bpffs", "path", bpffsHome)
	return nil
}
