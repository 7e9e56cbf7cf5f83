// Package e2e_test drives the real binary in the node of a lab topology: what is
// tested is what a user starts, and what a pod, the node and the world see of it.
package e2e_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"

	"bauta.dev/bauta/internal/lab"
)

// Two builds of the program, with different versions.
var bautaBin, upgradeBin string

func TestMain(m *testing.M) {
	if program := os.Getenv(withoutTCX); program != "" {
		fmt.Fprintln(os.Stderr, becomeOldKernelAgent(program))
		os.Exit(1)
	}
	os.Exit(run(m))
}

// programsEnv names a directory with both builds, bauta-e2e-1 and bauta-e2e-2, for
// machines without a compiler.
const programsEnv = "BAUTA_E2E_PROGRAMS"

func run(m *testing.M) int {
	flag.Parse()
	if err := chooseMode(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	made := os.Getenv(programsEnv)
	dir, err := os.MkdirTemp("", "bauta-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	for _, b := range []struct {
		path    *string
		version string
	}{{&bautaBin, "e2e-1"}, {&upgradeBin, "e2e-2"}} {
		if made != "" {
			*b.path = filepath.Join(made, "bauta-"+b.version)
			continue
		}
		*b.path = filepath.Join(dir, b.version, "bauta")
		cmd := exec.Command("go", "build", "-ldflags", "-s -w -X bauta.dev/bauta/internal/cli.version="+b.version,
			"-o", *b.path, "bauta.dev/bauta/cmd/bauta")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
	}
	// Half of the time a test waits.
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0)))
	}
	return m.Run()
}

// starts is served by one thread that lives as long as the tests: the signal
// that ends an agent with its parent is sent when the thread that started it ends.
var starts = make(chan func())

func init() {
	go func() {
		runtime.LockOSThread()
		for f := range starts {
			f()
		}
	}()
}

// startIn starts a command in a namespace.
func startIn(ns *lab.NS, cmd *exec.Cmd) error {
	done := make(chan error)
	starts <- func() { done <- ns.Start(cmd) }
	return <-done
}
