package agent

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// memory is what tables are sized from: the machine's memory, or less if a cgroup has a limit.
// Zero: it is not to be had.
func memory() uint64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return forTables(uint64(info.Totalram)*uint64(info.Unit), memoryLimit("/proc/self/cgroup", "/sys/fs/cgroup"))
}

// forTables makes tables of the default size fit into a limit. They are charged to the cgroup of
// who makes them: without room for them the kernel kills the agent. Tables of both families
// take up to a hundredth of what they are sized from, so here a third of the limit.
func forTables(total, limit uint64) uint64 {
	const share = 32
	if limit == 0 || limit > total {
		return total
	}
	return min(total, limit*share)
}

// memoryLimit is the lowest limit of the cgroups that this process is in, of either version;
// zero: there is none. A container may see its own cgroup as the root.
func memoryLimit(self, root string) (lowest uint64) {
	text, err := os.ReadFile(self)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		field := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(field) < 3 {
			continue
		}
		base, file := root, "memory.max"
		if field[1] == "memory" {
			base, file = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		} else if field[1] != "" {
			continue
		}
		for dir := filepath.Join("/", field[2]); ; dir = filepath.Dir(dir) {
			value, _ := os.ReadFile(filepath.Join(base, dir, file)) // none, or max: no limit
			if n, err := strconv.ParseUint(strings.TrimSpace(string(value)), 10, 64); err == nil && n > 0 && (lowest == 0 || n < lowest) {
				lowest = n
			}
			if dir == "/" {
				break
			}
		}
	}
	return lowest
}
