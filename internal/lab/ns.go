package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// netnsDir is where ip(8) looks for named network namespaces.
const netnsDir = "/run/netns"

// NS is a network namespace. An anonymous one lives as long as something in it
// is open; a named one is also held by a bind mount, for `ip netns exec`.
type NS struct {
	name string
	id   string // of the kernel, for messages about an anonymous one
	kept bool

	// mu keeps the descriptor open while it is used: a number that was closed
	// may already mean another namespace.
	mu sync.RWMutex
	fd netns.NsHandle
}

// quiet makes a new namespace predictable: addresses are usable at once, no
// router solicitations on the wire, no reverse path filter that would hide a
// leak, and ICMP errors that come every time (traceroute, path MTU).
var quiet = [][2]string{
	{"net.ipv6.conf.all.accept_dad", "0"},
	{"net.ipv6.conf.default.accept_dad", "0"},
	{"net.ipv6.conf.default.dad_transmits", "0"},
	{"net.ipv6.conf.default.accept_ra", "0"},
	{"net.ipv6.conf.default.router_solicitations", "0"},
	{"net.ipv6.icmp.ratelimit", "0"},
	{"net.ipv4.icmp_ratelimit", "0"},
	{"net.ipv4.conf.all.rp_filter", "0"},
	{"net.ipv4.conf.default.rp_filter", "0"},
	{"net.ipv4.ip_forward", "0"},
}

// NewNS creates a network namespace with its loopback device up. An empty name
// makes an anonymous one.
func NewNS(name string) (*NS, error) {
	if strings.ContainsAny(name, "/\x00") || name == "." || name == ".." {
		return nil, fmt.Errorf("network namespace %q: not a file name", name)
	}
	ns := &NS{name: name, fd: netns.None()}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w (CAP_SYS_ADMIN needed)", err)
		}
		fd, err := netns.Get()
		if err != nil {
			return fmt.Errorf("open: %w", err)
		}
		ns.fd, ns.id = fd, fd.UniqueId()
		if name != "" {
			return bindNS(name)
		}
		return nil
	})
	if err != nil {
		if ns.fd.IsOpen() {
			ns.fd.Close()
		}
		return nil, fmt.Errorf("create network namespace %s: %w", ns, err)
	}
	if err := ns.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare network namespace %s: %w", ns, err), ns.Close())
	}
	return ns, nil
}

func (ns *NS) prepare() error {
	for _, kv := range quiet {
		// A kernel without IPv6 has no such files, and needs no quieting.
		if err := ns.Sysctl(kv[0], kv[1]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return ns.SetUp("lo")
}

// bindNS gives the namespace of the calling thread a name.
func bindNS(name string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(netnsDir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL, 0o444)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w (left by an earlier run? `ip netns del %s` removes it)", err, name)
	}
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount("/proc/thread-self/ns/net", path, "none", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("bind mount %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// RemoveNamed removes a named namespace that an earlier process left.
func RemoveNamed(name string) error {
	path := filepath.Join(netnsDir, name)
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return os.Remove(path)
}

// Name returns the name, empty for an anonymous namespace.
func (ns *NS) Name() string { return ns.name }

// WithFD runs f with the open namespace, for requests that name a namespace by
// its file descriptor.
func (ns *NS) WithFD(f func(fd int) error) error {
	ns.mu.RLock()
	defer ns.mu.RUnlock()
	if !ns.fd.IsOpen() {
		return fmt.Errorf("network namespace %s: %w", ns, os.ErrClosed)
	}
	return f(int(ns.fd))
}

func (ns *NS) String() string {
	if ns.name == "" {
		return ns.id
	}
	return ns.name
}

// Do runs f on a thread inside the namespace. Goroutines started by f are not
// inside it; sockets and processes created by f are, for all their life.
func (ns *NS) Do(f func() error) error {
	return onThread(func() error {
		err := ns.WithFD(func(fd int) error { return netns.Set(netns.NsHandle(fd)) })
		if err != nil {
			return fmt.Errorf("enter network namespace %s: %w", ns, err)
		}
		return f()
	})
}

// onThread runs f on a locked thread and afterwards puts the thread back into
// the namespace it came from. It stays on the caller's goroutine, so that f may
// call t.Fatal. A thread that can't be put back is never unlocked: the runtime
// throws it away with the goroutine, and nothing else runs in a wrong namespace.
func onThread(f func() error) (err error) {
	runtime.LockOSThread()
	origin, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("open own network namespace: %w", err)
	}
	defer func() {
		defer origin.Close()
		if back := netns.Set(origin); back != nil {
			err = errors.Join(err, fmt.Errorf("return to own network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return f()
}

// Keep makes Close leave a named namespace in place.
func (ns *NS) Keep() { ns.kept = ns.name != "" }

// Close removes the namespace. Its devices vanish as soon as no process or
// socket is left in it. It may be called again.
func (ns *NS) Close() error {
	ns.mu.Lock()
	defer ns.mu.Unlock()
	if !ns.fd.IsOpen() {
		return nil
	}
	var unnamed error
	if ns.name != "" && !ns.kept {
		unnamed = RemoveNamed(ns.name)
	}
	return errors.Join(unnamed, ns.fd.Close())
}
