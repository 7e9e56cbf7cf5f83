package iptables

import (
	"bufio"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// lockFile is what all programs of iptables-legacy lock while they change rules.
func (o Options) lockFile() string {
	const variable = "XTABLES_LOCKFILE="
	for _, s := range append(os.Environ(), o.env...) {
		if path, ok := strings.CutPrefix(s, variable); ok {
			return path
		}
	}
	return "/run/xtables.lock"
}

func (o Options) lockError(name string) error {
	lockFile := o.lockFile()
	err := fmt.Errorf("%s: %w", name, ErrLocked)
	if holder := lockHolder(lockFile); holder != "" {
		err = fmt.Errorf("%s: %w (%s)", name, ErrLocked, holder)
	}
	return advice.New(err, "it is tried again; `lslocks` shows who holds "+lockFile, "raise iptables-lock-timeout if others need long")
}

// lockHolder names the process that holds a lock on path, as far as /proc tells.
func lockHolder(path string) string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return ""
	}
	file, err := os.Open("/proc/locks")
	if err != nil {
		return ""
	}
	defer file.Close()
	inode := fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	for scan := bufio.NewScanner(file); scan.Scan(); {
		// 1: FLOCK  ADVISORY  WRITE 1234 00:19:5678 0 EOF; waiting ones have "->" second
		f := strings.Fields(scan.Text())
		if len(f) < 6 || f[1] != "FLOCK" || f[5] != inode {
			continue
		}
		comm, err := os.ReadFile("/proc/" + f[4] + "/comm")
		if err != nil {
			return "pid " + f[4]
		}
		return fmt.Sprintf("%s, pid %s", strings.TrimSpace(string(comm)), f[4])
	}
	return ""
}
