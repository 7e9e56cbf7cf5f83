package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// prepareRoot makes opt.Root a directory of mode 0700 on a bpffs.
func prepareRoot(opt Options) error {
	parent, err := existingParent(opt.Root)
	if err != nil {
		return rootError(err)
	}
	onBPF, err := isBPFFS(parent)
	if err != nil {
		return err
	}
	mounts, err := readMountTable()
	if err != nil {
		return err
	}
	switch {
	case !onBPF:
		if err := mountBPFFS(opt, mounts); err != nil {
			return err
		}
	case !opt.AllowPrivateBPFFS && mounts.private(parent):
		return advice.New(fmt.Errorf("bpf-root %s: its bpffs belongs to a private mount namespace and would vanish with it", opt.Root),
			"mount the host's "+bpffsHome+" into the container", "in a lab: set allow-private-bpffs")
	}
	if err := os.MkdirAll(opt.Root, 0o700); err != nil {
		return rootError(err)
	}
	st, err := os.Stat(opt.Root)
	if err == nil && st.Mode().Perm() != 0o700 {
		err = os.Chmod(opt.Root, 0o700)
	}
	return rootError(err)
}

// rootError explains what is wrong with the root directory; nil if nothing is.
func rootError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return advice.New(fmt.Errorf("bpf-root: %w", err), "remount the bpffs writable: mount -o remount,rw "+bpffsHome,
			"in a container: the volume must not be readOnly")
	case errors.Is(err, os.ErrPermission):
		return advice.New(fmt.Errorf("bpf-root: %w", err), "run as root")
	}
	return advice.New(fmt.Errorf("bpf-root: %w", err), "--bpf-root must be a directory on a writable bpffs, for example "+bpffsHome+"/bauta")
}

func existingParent(path string) (string, error) {
	for p := filepath.Clean(path); ; p = filepath.Dir(p) {
		_, err := os.Stat(p)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, os.ErrNotExist) || p == filepath.Dir(p) {
			return "", err
		}
	}
}

// lockRoot takes the lock that keeps a second agent off the same root.
func lockRoot(root string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, rootError(err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, advice.New(fmt.Errorf("lock %s: %w", root, ErrBusy),
				"stop it first, or give this one a --bpf-root and --run-dir of its own")
		}
		return nil, fmt.Errorf("lock %s: %w", root, err)
	}
	return dir, nil
}
