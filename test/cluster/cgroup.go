package cluster

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroups = "/sys/fs/cgroup"

// hierarchy is one of cgroup version 1: its controllers and where this process is.
type hierarchy struct{ controllers, dir string }

// hierarchies lists them. Nodes live below the cgroups of the process that starts
// them, so that whatever limits it limits them as well.
func hierarchies() ([]hierarchy, error) {
	f, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []hierarchy
	for scan := bufio.NewScanner(f); scan.Scan(); {
		field := strings.SplitN(scan.Text(), ":", 3)
		if len(field) < 3 || field[1] == "" {
			continue // version 2
		}
		mount := strings.TrimPrefix(field[1], "name=")
		list = append(list, hierarchy{field[1], filepath.Join(cgroups, mount, field[2])})
	}
	if len(list) == 0 {
		return nil, errors.New("cgroups: no hierarchy of version 1, which the nodes need")
	}
	return list, nil
}

func (h hierarchy) mountPoint() string {
	return filepath.Join(cgroups, strings.TrimPrefix(h.controllers, "name="))
}

// joinCgroups moves this process into new cgroups of the name.
func joinCgroups(list []hierarchy, name string) error {
	for _, h := range list {
		dir := filepath.Join(h.dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if slices.Contains(strings.Split(h.controllers, ","), "cpuset") {
			for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // empty in a new one
				value, err := os.ReadFile(filepath.Join(h.dir, file))
				if err != nil {
					return err
				}
				if err := os.WriteFile(filepath.Join(dir, file), value, 0); err != nil {
					return err
				}
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return err
		}
	}
	return nil
}

// mountCgroups mounts the hierarchies as the cgroup namespace shows them.
func mountCgroups(list []hierarchy) error {
	if err := unix.Mount("tmpfs", cgroups, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount %s: %w", cgroups, err)
	}
	for _, h := range list {
		if err := os.Mkdir(h.mountPoint(), 0o755); err != nil {
			return err
		}
		options := h.controllers
		if strings.HasPrefix(options, "name=") {
			options = "none," + options
		}
		if err := unix.Mount("cgroup", h.mountPoint(), "cgroup", 0, options); err != nil {
			return fmt.Errorf("mount cgroup %s: %w", h.controllers, err)
		}
	}
	return nil
}

// sweepCgroups removes what clusters left whose process was killed.
func sweepCgroups() error {
	list, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range list {
		left, err := filepath.Glob(filepath.Join(h.dir, namePrefix+"*"))
		errs = append(errs, err)
		for _, dir := range left {
			var pid int
			if _, err := fmt.Sscanf(filepath.Base(dir), namePrefix+"%d-", &pid); err != nil || alive(pid) {
				continue
			}
			// Busy is one that is used all the same, from another PID namespace.
			if err := removeTree(dir); !errors.Is(err, unix.EBUSY) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

// removeCgroups removes the cgroups of the name and all below them. The kernel lets
// go of one only after its last process, a moment later.
func removeCgroups(name string) error {
	list, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range list {
		top := filepath.Join(h.dir, name)
		deadline := time.Now().Add(5 * time.Second)
		for {
			err := removeTree(top)
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				errs = append(errs, err)
				break
			}
			time.Sleep(20 * time.Millisecond) // there is no event for it
		}
	}
	return errors.Join(errs...)
}

// removeTree removes a directory of directories whose files can't be removed.
func removeTree(top string) error {
	entries, err := os.ReadDir(top)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(top, e.Name())); err != nil {
				return err
			}
		}
	}
	return unix.Rmdir(top)
}
