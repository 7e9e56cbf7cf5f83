// Command init is process 1 of a test VM: it loads the kernel modules of the
// archive, runs /test with the arguments in /args, says how that ended in a line
// "RESULT ..." on the console and powers off.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	err := run()
	switch {
	case err != nil:
		fmt.Printf("\nRESULT FAIL %v\n", err)
	default:
		fmt.Printf("\nRESULT PASS\n")
	}
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("power off:", err)
	}
}

func run() error {
	for _, m := range []struct{ fs, point string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"bpf", "/sys/fs/bpf"},
	} {
		if err := unix.Mount(m.fs, m.point, m.fs, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.point, err)
		}
	}
	names, err := os.ReadFile("/modules.load")
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(names)) {
		if err := load("/modules/" + name); err != nil {
			fmt.Printf("load module %s: %v\n", name, err) // the tests say what they miss
		}
	}
	args, err := os.ReadFile("/args")
	if err != nil {
		return err
	}
	cmd := exec.Command("/test", strings.Fields(string(args))...)
	cmd.Dir = "/tmp"
	cmd.Env = []string{"PATH=/", "HOME=/tmp", "CI=true"}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	return cmd.Run()
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}
