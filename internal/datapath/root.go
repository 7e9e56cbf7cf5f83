package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Names of the pins below the root directory. Map pins are the maps' own names.
const (
	pinForward4 = "forward4"
	pinForward6 = "forward6"
	pinReverse4 = "reverse4"
	pinReverse6 = "reverse6"
	pinInbound4 = "inbound4"
	pinInbound6 = "inbound6"
	pinControl  = "control"
	pinSettings = "settings"
	pinCounters = "counters"
	pinDevices  = "devices"
	pinReap     = "reap"
)

// pinTrie names the pin of one table of a generation, for readers: a map in a map
// can't be opened through its outer map without CAP_SYS_ADMIN.
func pinTrie(generation uint32, which int) string {
	return fmt.Sprintf("%s_%d", [...]string{"source", "destination"}[which], generation)
}

const bpffsHome = "/sys/fs/bpf"

// prepareRoot makes opt.Root a directory of mode 0700 on a bpffs.
func prepareRoot(opt Options) error {
	parent := existingParent(opt.Root)
	onBPF, err := isBPFFS(parent)
	if err != nil {
		return err
	}
	if !onBPF {
		if err := mountBPFFS(opt); err != nil {
			return err
		}
	} else if !opt.AllowPrivateBPFFS && !inHostMountNamespace() && !isMountedFromOutside(parent) {
		return hint(fmt.Errorf("%s: this bpffs belongs to a private mount namespace and would vanish with it", parent),
			"mount the host's /sys/fs/bpf into the container", "in a lab: set allow-private-bpffs")
	}
	if err := os.MkdirAll(opt.Root, 0o700); err != nil {
		return hint(fmt.Errorf("bpf-root: %w", err), "--bpf-root must be a directory on a writable bpffs, for example /sys/fs/bpf/bauta")
	}
	return os.Chmod(opt.Root, 0o700)
}

func existingParent(path string) string {
	for p := filepath.Clean(path); ; p = filepath.Dir(p) {
		if _, err := os.Stat(p); err == nil || p == filepath.Dir(p) {
			return p
		}
	}
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
func mountBPFFS(opt Options) error {
	notMounted := fmt.Errorf("bpf-root %s: not on a bpffs", opt.Root)
	if !strings.HasPrefix(filepath.Clean(opt.Root)+"/", bpffsHome+"/") {
		return hint(notMounted, "choose a directory below "+bpffsHome, "or mount one: mount -t bpf bpf DIR")
	}
	if !inHostMountNamespace() && !opt.AllowPrivateBPFFS {
		return hint(notMounted, "mount it on the host (mount -t bpf bpf "+bpffsHome+") and into the container",
			"the agent mounts it only in the host's mount namespace")
	}
	if err := unix.Mount("bpf", bpffsHome, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return hint(fmt.Errorf("mount bpffs on %s: %w", bpffsHome, err), "as root: mount -t bpf bpf "+bpffsHome)
	}
	opt.Log.Info("mounted bpffs", "path", bpffsHome)
	return nil
}

// initPIDNamespace is the inode of the first PID namespace (linux/proc_ns.h); in
// it, process 1 is the host's.
const initPIDNamespace = "pid:[4026531836]"

func inHostMountNamespace() bool {
	if pid, err := os.Readlink("/proc/self/ns/pid"); err != nil || pid != initPIDNamespace {
		return false
	}
	self, err1 := os.Readlink("/proc/self/ns/mnt")
	init, err2 := os.Readlink("/proc/1/ns/mnt")
	return err1 == nil && err2 == nil && self == init
}

// isMountedFromOutside tells whether the mount at path came from a parent mount
// namespace: a bpffs of a host that a container was given. Such a mount has peers
// or a master, or stands below a bind mount; a bpffs mounted here has neither.
func isMountedFromOutside(path string) bool {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	best, shared := -1, false
	for _, line := range strings.Split(string(info), "\n") {
		f := strings.Fields(line)
		if len(f) < 7 || (f[4] != path && !strings.HasPrefix(path, strings.TrimSuffix(f[4], "/")+"/")) {
			continue
		}
		if len(f[4]) >= best {
			best, shared = len(f[4]), f[6] != "-" || f[3] != "/"
		}
	}
	return shared
}

// lockRoot takes the lock that keeps a second agent off the same root.
func lockRoot(root string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("bpf-root: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, hint(fmt.Errorf("lock %s: %w", root, ErrBusy),
				"stop it first, or give this one a --bpf-root and --run-dir of its own")
		}
		return nil, fmt.Errorf("lock %s: %w", root, err)
	}
	return dir, nil
}

// replacePin pins an object at path, over what is there, without a moment in between.
func replacePin(pin func(string) error, path string) error {
	tmp := path + "_new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale pin: %w", err)
	}
	if err := pin(tmp); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("pin %s: %w", path, err)
	}
	return nil
}
