package agent

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// netnsPath is the network namespace of the calling thread.
const netnsPath = "/proc/thread-self/ns/net"

// ErrBusy says that another agent owns the rules of this network namespace.
var ErrBusy = errors.New("another agent in iptables mode runs in this network namespace")

// claim is a locked file, which is gone when it is closed, and with it the directory, if
// that was made for it.
type claim struct {
	file *os.File // nil: closed
	dir  string   // "": it was there
}

// claimRules makes this process the owner of the rules in this network namespace. The lock
// is a file that nobody but root can open, named after the namespace; the kernel
// unlocks it when the process ends. The directory is the same whatever the run directory is: a
// network namespace has one set of rules.
func claimRules() (io.Closer, error) { return claimRulesIn(DefaultRunDir) }

func claimRulesIn(dir string) (io.Closer, error) {
	var ns unix.Stat_t
	if err := unix.Stat(netnsPath, &ns); err != nil {
		return nil, fmt.Errorf("iptables: own the rules: %s: %w", netnsPath, err)
	}
	path := filepath.Join(dir, fmt.Sprintf("iptables-%d.lock", ns.Ino))
	for {
		var c *claim
		var err error
		linger(func() bool {
			c, err = lockFile(path)
			return errors.Is(err, unix.EWOULDBLOCK)
		})
		switch {
		case errors.Is(err, errGone): // its owner has just ended
			continue
		case errors.Is(err, unix.EWOULDBLOCK):
			return nil, advice.New(ErrBusy, "stop it first: rules have one owner")
		case err != nil:
			return nil, fmt.Errorf("iptables: own the rules: %w", err)
		}
		return c, nil
	}
}

// errGone says that a lock is that of a file that is no longer there.
var errGone = errors.New("the file was removed")

func lockFile(path string) (_ *claim, err error) {
	c := &claim{}
	dir := filepath.Dir(path)
	switch err := os.Mkdir(dir, 0o700); {
	case err == nil:
		c.dir = dir
	case !errors.Is(err, fs.ErrExist):
		return nil, err
	}
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errGone
	} else if err != nil {
		return nil, err
	}
	if !private(info) {
		return nil, advice.New(fmt.Errorf("directory %s: other users can write to it", dir), "chmod 700 "+dir)
	}
	if c.file, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600); errors.Is(err, fs.ErrNotExist) {
		return nil, errGone // the directory
	} else if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.file.Close()
		}
	}()
	if err := unix.Flock(int(c.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	there, err := os.Stat(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if mine, statErr := c.file.Stat(); err != nil || statErr != nil || !os.SameFile(there, mine) {
		return nil, errGone
	}
	return c, nil
}

// Close removes the file while it is locked.
func (c *claim) Close() error {
	if c.file == nil {
		return nil
	}
	err := os.Remove(c.file.Name())
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	err = errors.Join(err, c.file.Close())
	c.file = nil
	if c.dir != "" {
		os.Remove(c.dir) // if it is empty
	}
	return err
}
