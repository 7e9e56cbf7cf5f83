package lab

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// MountBPFFS mounts an empty BPF file system on an existing directory. What is
// pinned there is released by unmount, which may be called more than once.
func MountBPFFS(dir string) (unmount func() error, err error) {
	if err := unix.Mount("bpffs", dir, "bpf", 0, "mode=0700"); err != nil {
		return nil, fmt.Errorf("mount bpffs on %s: %w", dir, err)
	}
	return sync.OnceValue(func() error {
		// Detach: a process that still has a pin open must not keep the mount.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return nil
	}), nil
}
