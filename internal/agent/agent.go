// Package agent is the one place where facts, policy and data plane meet.
//
// Run reads options, files and the node's network, builds a policy.Policy of them
// and applies it to the kernel, again and again as they change. ReadStatus tells
// what is in force, from the running agent or, with the agent down, from what it
// left pinned.
//
// Invariants: one goroutine owns all state, so there are no locks around it; the
// watchers only say that something changed. Others see the state as immutable
// Status values. A bad file never changes the policy: the last good state stays.
// What the agent leaves behind keeps working; it never takes the data plane away.
package agent

import (
	"context"
	"log/slog"

	"bauta.dev/bauta/internal/config"
)

// Default places of what the agent leaves for others.
const (
	DefaultBPFRoot = "/sys/fs/bpf/bauta"
	DefaultRunDir  = "/run/bauta"
)

// Options says what to run.
type Options struct {
	Config        config.Config
	ConfigSources config.Sources // where Config came from: a later difference needs a restart
	BPFRoot       string         // zero: DefaultBPFRoot
	RunDir        string         // zero: DefaultRunDir; holds agent.sock and policy.json
	Version       string
	Reload        <-chan struct{} // each receive re-reads everything now; nil: never
	Log           *slog.Logger    // zero: no log
}

// Error is an error with remedies. The command line prints "error: ERR", then
// "hint: HINT" lines.
type Error struct {
	Err   error
	Hints []string
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Run runs the agent until ctx is done, then returns nil. The data plane stays.
func Run(ctx context.Context, opt Options) error {
	panic("not yet")
}
