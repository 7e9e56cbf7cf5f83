package datapath

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/lab/labtest"
)

func TestPrivateMounts(t *testing.T) {
	t.Parallel()
	host := parseMounts("20 1 8:1 / / rw - ext4 /dev/sda rw\n21 20 0:30 / /sys/fs/bpf rw shared:4 - bpf bpf rw\n")
	container := "70 60 0:99 / / rw - overlay overlay rw\n"
	for _, c := range []struct {
		name    string
		own     string
		host    []mount
		place   place
		private bool
	}{
		{"host", "21 20 0:30 / /sys/fs/bpf rw shared:4 - bpf bpf rw\n", host, placeHost, false},
		{"container with hostPID and the host's bpffs", container + "71 70 0:30 / /sys/fs/bpf rw - bpf bpf rw\n", host, placeElsewhere, false},
		{"service with a mount namespace", container + "71 70 0:30 / /sys/fs/bpf rw master:4 - bpf bpf rw\n", host, placeElsewhere, false},
		{"bpffs of its own", container + "71 70 0:44 / /sys/fs/bpf rw - bpf bpf rw\n", host, placeElsewhere, true},
		{"bpffs of its own over the host's", container + "71 70 0:30 / /sys/fs/bpf rw - bpf bpf rw\n72 71 0:44 / /sys/fs/bpf rw - bpf bpf rw\n",
			host, placeElsewhere, true},
		{"container", container + "71 70 0:30 / /sys/fs/bpf rw - bpf bpf rw\n", nil, placeUnknown, false},
	} {
		table := mountTable{c.place, parseMounts(c.own), c.host}
		if got := table.private("/sys/fs/bpf/bauta"); got != c.private {
			t.Errorf("%s: private %t", c.name, got)
		}
	}
	if m := parseMounts(`30 1 0:1 / /a\040b rw - bpf bpf rw`); m[0].point != "/a b" {
		t.Errorf("mount point %q", m[0].point)
	}
}

// In a mount namespace of its own, the agent neither mounts a bpffs nor uses one
// that would vanish with it, unless it is told that this is a lab.
func TestPrivateMountNamespace(t *testing.T) {
	t.Parallel()
	labtest.Root(t)
	failed := make(chan string, 10)
	go func() {
		defer close(failed)
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
			failed <- err.Error()
			return
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			failed <- err.Error()
			return
		}
		for unix.Unmount(bpffsHome, unix.MNT_DETACH) == nil {
		}
		opt := Options{Root: bpffsHome + "/bauta", DefaultFlows: 64}
		if _, err := Open(opt); err == nil || !strings.Contains(hints(err), "on the host") {
			failed <- "no bpffs: " + text(err)
		}
		opt.AllowPrivateBPFFS = true
		d, err := Open(opt)
		if err != nil {
			failed <- "lab: " + text(err)
			return
		}
		if st, err := os.Stat(opt.Root); err != nil || st.Mode().Perm() != 0o700 {
			failed <- "root directory: " + text(err)
		}
		d.Close()
		opt.AllowPrivateBPFFS = false
		if _, err := Open(opt); err == nil || !strings.Contains(hints(err), "allow-private-bpffs") {
			failed <- "private bpffs: " + text(err)
		}
		// A bind mount of a bpffs of the host is no private one.
		if table, err := readMountTable(); err != nil || table.place != placeElsewhere && table.place != placeUnknown {
			failed <- "not seen as a namespace of its own: " + text(err)
		}
		unix.Unmount(bpffsHome, unix.MNT_DETACH)
	}()
	for why := range failed {
		t.Error(why)
	}
}

func text(err error) string {
	if err == nil {
		return "no error"
	}
	return err.Error() + "\n" + hints(err)
}

// notRootEnv makes the test below the process without privileges.
const notRootEnv = "BAUTA_TEST_OPEN_WITHOUT_PRIVILEGES"

// Without privileges the error says so. In a process of its own, because what the
// BPF library finds out about the kernel it remembers.
func TestOpenNotRoot(t *testing.T) {
	if root := os.Getenv(notRootEnv); root != "" {
		runtime.LockOSThread()
		var none [2]unix.CapUserData
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			t.Fatal(err)
		}
		_, err := Open(Options{Root: root})
		if !strings.Contains(hints(err), "run as root") {
			t.Errorf("without capabilities: %s", text(err))
		}
		return
	}
	t.Parallel()
	cmd := exec.Command(os.Args[0], "-test.run=^TestOpenNotRoot$")
	cmd.Env = append(os.Environ(), notRootEnv+"="+filepath.Join(labtest.BPFFS(t), "bauta"))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
