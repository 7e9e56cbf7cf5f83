package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Machine is what the machine is like that a cluster runs on: its kernel settings,
// and what this process' clusters have there.
type Machine map[string]string

// restless are settings that change by themselves, or are another one's to change.
var restless = []string{
	"/proc/sys/fs/dentry-state", "/proc/sys/fs/file-nr", "/proc/sys/fs/inode-nr", "/proc/sys/fs/inode-state",
	"/proc/sys/fs/aio-nr", "/proc/sys/fs/quota/", "/proc/sys/kernel/ns_last_pid", "/proc/sys/kernel/random/",
	"/proc/sys/kernel/pty/nr", "/proc/sys/kernel/tainted", "/proc/sys/kernel/keys/",
	"/proc/sys/net/netfilter/nf_conntrack_count", "/proc/sys/fs/binfmt_misc/",
}

// Look reads what the machine is like.
func Look() (Machine, error) {
	m := Machine{}
	err := filepath.WalkDir("/proc/sys", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || isRestless(path) {
			return err
		}
		// Some can only be written.
		if value, err := os.ReadFile(path); err == nil {
			m[path] = strings.TrimSpace(string(value))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	list, err := hierarchies()
	if err != nil {
		return nil, err
	}
	left := []string{"/var/lib/kubelet", "/var/lib/cni", "/etc/cni", "/opt/cni"}
	mine := fmt.Sprintf("%s%d-*", namePrefix, os.Getpid())
	for _, h := range list {
		groups, err := filepath.Glob(filepath.Join(h.dir, mine))
		if err != nil {
			return nil, err
		}
		left = append(left, groups...)
	}
	for _, path := range left {
		if _, err := os.Lstat(path); err == nil {
			m[path] = "there"
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, strings.TrimSuffix(mine, "*")) {
			m["mount "+strings.TrimSpace(line)] = "there"
		}
	}
	return m, m.addProcesses(strings.TrimSuffix(mine, "*"))
}

// addProcesses adds the components of clusters, which all are told a file of theirs.
func (m Machine) addProcesses(mine string) error {
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range all {
		args, _ := os.ReadFile(dir + "/cmdline") // it may have ended meanwhile
		env, _ := os.ReadFile(dir + "/environ")
		command := strings.ReplaceAll(string(args), "\x00", " ")
		if strings.Contains(command, mine) || strings.Contains(string(env), specEnv+"="+filepath.Join(os.TempDir(), mine)) {
			m["process "+filepath.Base(dir)+": "+shorten(command)] = "there"
		}
	}
	return nil
}

func isRestless(path string) bool {
	return slices.ContainsFunc(restless, func(r string) bool { return strings.HasPrefix(path, r) })
}

// Changes lists what is another one now, or is no more, or is new.
func (m Machine) Changes(now Machine) []string {
	var list []string
	all := maps.Clone(m)
	maps.Copy(all, now)
	for _, what := range slices.Sorted(maps.Keys(all)) {
		if before, after := m[what], now[what]; before != after {
			list = append(list, fmt.Sprintf("%s: %q, it was %q", what, after, before))
		}
	}
	return list
}

// Unchanged waits a moment for the machine to be as it was: the kernel removes
// namespaces later than asked.
func (m Machine) Unchanged() error {
	var changes []string
	for range 20 {
		now, err := Look()
		if err != nil {
			return err
		}
		if changes = m.Changes(now); len(changes) == 0 {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("the machine is not as it was:\n%s", strings.Join(changes, "\n"))
}
