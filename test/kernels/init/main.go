// Command init is process 1 of a test VM: it loads the kernel modules of the
// archive, runs the test suites that /suites lists, says on the console how each
// ended and powers off. A line of /suites is the name of a suite, the seconds it may
// take, the directory to run it in, and a command:
//
//	lab 120 internal/lab lab.test -test.v
//
// A suite that fails or takes too long does not keep the next from running.
// On the console "SUITE lab" comes before its output, and "DONE lab PASS 12" (seconds)
// or "DONE lab FAIL 12 exit status 1" behind it. "RESULT PASS" or "RESULT FAIL" is the end.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	result, err := run()
	if err != nil {
		result = fmt.Sprintf("FAIL %v", err)
	}
	fmt.Printf("\nRESULT %s\n", result)
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Println("power off:", err)
	}
}

func run() (result string, err error) {
	for _, m := range []struct{ fs, point string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}, {"bpf", "/sys/fs/bpf"},
	} {
		if err := unix.Mount(m.fs, m.point, m.fs, 0, ""); err != nil {
			return "", fmt.Errorf("mount %s: %w", m.point, err)
		}
	}
	// A new namespace has no devices but its loopback, whatever modules are loaded.
	if err := os.WriteFile("/proc/sys/net/core/fb_tunnels_only_for_init_net", []byte("2"), 0); err != nil {
		return "", err
	}
	names, err := os.ReadFile("/modules.load")
	if err != nil {
		return "", err
	}
	for _, name := range strings.Fields(string(names)) {
		if err := load("/modules/" + name); err != nil {
			fmt.Printf("load module %s: %v\n", name, err) // the tests say what they miss
		}
	}
	suites, err := os.ReadFile("/suites")
	if err != nil {
		return "", err
	}
	result = "PASS"
	for line := range strings.Lines(string(suites)) {
		words := strings.Fields(line)
		if len(words) < 4 {
			continue
		}
		seconds, err := strconv.Atoi(words[1])
		if err != nil {
			return "", fmt.Errorf("suite %s: %w", words[0], err)
		}
		fmt.Printf("\nSUITE %s\n", words[0])
		start, how := time.Now(), "PASS"
		err = suite(time.Duration(seconds)*time.Second, words[2], words[3], words[4:])
		if err != nil {
			how, result = "FAIL", "FAIL"
		}
		fmt.Printf("\nDONE %s %s %.0f", words[0], how, time.Since(start).Seconds())
		if err != nil {
			fmt.Printf(" %v", err)
		}
		fmt.Println()
	}
	return result, nil
}

func suite(limit time.Duration, dir, program string, args []string) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/"+program, args...)
	cmd.Dir = filepath.Join("/src", dir)
	if err := os.MkdirAll(cmd.Dir, 0o755); err != nil {
		return err
	}
	cmd.Env = []string{"PATH=/bin", "HOME=/tmp", "CI=true", "BAUTA_E2E_PROGRAMS=/bin", "BAUTA_TEST_PATIENCE=5"}
	// The kernel makes what it does not know of its command line the environment of process 1.
	if thin := os.Getenv("BAUTA_TEST_THIN"); thin != "" {
		cmd.Env = append(cmd.Env, "BAUTA_TEST_THIN="+thin)
	}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	err := cmd.Run()
	endAll()
	if ctx.Err() != nil {
		return fmt.Errorf("not ended after %s", limit)
	}
	return err
}

// endAll ends what a suite that was cut off has left running beside the next one.
func endAll() {
	unix.Kill(-1, unix.SIGKILL) // all but process 1
	for {
		if _, err := unix.Wait4(-1, nil, 0, nil); errors.Is(err, unix.ECHILD) {
			return
		}
	}
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}
