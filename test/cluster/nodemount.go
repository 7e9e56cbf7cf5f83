package cluster

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// kernelWishes are settings that the kubelet makes for the whole machine. It is
// shown files that have them already.
var kernelWishes = map[string]string{
	"vm/overcommit_memory": "1",
	"kernel/panic":         "10",
	"kernel/panic_on_oops": "1",
}

// stateDirs are directories that a node has of its own. They are empty at its first start.
var stateDirs = []string{"/var/lib", "/var/log"}

// mountNode makes the file systems of a node out of those of the machine, in the
// mount namespace of the calling process.
func (s *nodeSpec) mountNode() error {
	list, err := hierarchies()
	if err != nil {
		return err
	}
	mount := func(source, target, kind string, flags uintptr, data string) {
		if err == nil {
			if err = unix.Mount(source, target, kind, flags, data); err != nil {
				err = fmt.Errorf("mount %s on %s: %w", source, target, err)
			}
		}
	}
	mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	mount("proc", "/proc", "proc", 0, "")
	mount("sysfs", "/sys", "sysfs", 0, "")
	if err == nil {
		err = mountCgroups(list)
	}
	mount("bpf", "/sys/fs/bpf", "bpf", 0, "mode=0700")
	mount("tmpfs", "/run", "tmpfs", 0, "mode=755")

	// The state of a node outlives a reboot; nothing else can be written.
	mount(s.Dir, s.Dir, "", unix.MS_BIND, "")
	for _, dir := range stateDirs {
		mount(s.state(dir), dir, "", unix.MS_BIND, "")
	}
	mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")

	mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, "")
	mount("/proc/sys/net", "/proc/sys/net", "", unix.MS_BIND, "")
	mount("", "/proc/sys", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	for setting, value := range kernelWishes {
		if err != nil {
			return err
		}
		file := filepath.Join("/run", filepath.Base(setting))
		err = os.WriteFile(file, []byte(value+"\n"), 0o644)
		mount(file, filepath.Join("/proc/sys", setting), "", unix.MS_BIND, "")
	}
	// Pods get to see what is mounted later, such as a BPF file system.
	mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
	return err
}

// state is where the node keeps what it has in a directory.
func (s *nodeSpec) state(dir string) string { return filepath.Join(s.Dir, "root", dir) }

// temp is for temporary files: /tmp may be where the directories of all nodes are.
func (s *nodeSpec) temp() string { return s.state("/tmp") }
