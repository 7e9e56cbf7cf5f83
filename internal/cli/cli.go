// Package cli is the command line: commands, their text, and exit statuses.
//
// Nouns read, verbs write. A command prints its result on standard output, or
// returns an error: Main turns that into one line "error: ..." on standard
// error, then "hint: ..." lines that say what to type. Commands see the world
// through Env, and none exits, so that tests run them in-process.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/config"
)

// Exit statuses.
const (
	exitOK       = 0
	exitFailed   = 1
	exitUsage    = 2
	exitDegraded = 3
)

// Env is what a command sees of the process around it.
type Env struct {
	Context context.Context // ends long-running commands; nil: never
	Stdout  io.Writer
	Stderr  io.Writer
	Environ []string // KEY=VALUE
	Root    bool     // the process runs as root
	Version string   // empty: that of the build
}

// System is the Env of this process.
func System() Env {
	return Env{
		Context: context.Background(),
		Stdout:  os.Stdout,
		Stderr:  os.Stderr,
		Environ: os.Environ(),
		Root:    os.Geteuid() == 0,
		Version: version,
	}
}

// Main runs the command in args and returns the exit status.
func Main(env Env, args []string) int {
	if env.Context == nil {
		env.Context = context.Background()
	}
	root := newRoot(env)
	root.SetArgs(args)
	err := root.ExecuteContext(env.Context)
	report(env.Stderr, err)
	return status(err)
}

// errDegraded is the result of status when something is degraded: printed
// already, as the command's own output.
var errDegraded = errors.New("degraded")

// errReported is the result of a command that has printed its errors itself.
var errReported = errors.New("reported")

// usageError is a command line that names what does not exist.
type usageError struct {
	msg   string
	hints []string
}

func (e *usageError) Error() string { return e.msg }

func status(err error) int {
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errDegraded):
		return exitDegraded
	}
	if _, ok := errors.AsType[*usageError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// report prints err in the form of the contract.
func report(w io.Writer, err error) {
	if err == nil || errors.Is(err, errDegraded) || errors.Is(err, errReported) {
		return
	}
	fmt.Fprintf(w, "error: %s\n", oneLine(err.Error()))
	for _, h := range hints(err) {
		fmt.Fprintf(w, "hint: %s\n", oneLine(h))
	}
}

// hints collects what the errors in the chain advise, the outermost first.
func hints(err error) []string {
	var all []string
	if e, ok := errors.AsType[*usageError](err); ok {
		all = append(all, e.hints...)
	}
	if e, ok := errors.AsType[*config.Error](err); ok {
		all = append(all, e.Hints...)
	}
	return append(all, advice.Of(err)...)
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// paths are where a data plane and its agent live; every command takes both.
type paths struct{ bpfRoot, runDir string }

// app is what the commands share.
type app struct {
	Env
	paths
}

// print writes text to standard output; a full disk or closed pipe is an error.
func (a *app) print(text string) error {
	if _, err := io.WriteString(a.Stdout, text); err != nil {
		return fmt.Errorf("standard output: %w", err)
	}
	return nil
}

func (a *app) printf(format string, args ...any) error { return a.print(fmt.Sprintf(format, args...)) }

// requireRoot refuses a command that the kernel would refuse less clearly.
func (a *app) requireRoot(c *cobra.Command, hints ...string) error {
	if a.Root {
		return nil
	}
	return advice.New(fmt.Errorf("%s: must run as root", strings.TrimPrefix(c.CommandPath(), "bauta ")), hints...)
}
