// Package iptables renders a policy into netfilter rules and sets, and owns all
// of them: it writes, compares, reads and removes, with the binaries of iptables
// for rules and by netlink for sets.
//
// Render is pure: a policy gives the rules of one family, in the very words in
// which the kernel's are listed. So whether something has to be written is a
// comparison of texts, chain by chain, and what is right is left alone, with its
// counters.
//
// Invariants:
//
//   - Only chains and sets whose names begin with BAUTA- and bauta- are ours, and the
//     one jump to BAUTA-POSTROUTING, first in POSTROUTING of nat and of mangle.
//   - An excluded packet is returned, not accepted: the rules of others, such as
//     those of kube-proxy, still see it.
//   - Sets change by a swap, and shrink last, so that a prefix that moves is always in
//     one. Rules change by one transaction a family and table, the guard of mangle before
//     nat: no packet meets half of a policy, and none leaves untranslated in between.
//   - What fails half-way is taken back.
//   - No text of a user is an argument of a program: rules go in by stdin, and names of
//     devices are checked.
package iptables

import (
	"errors"
	"log/slog"
	"time"

	"bauta.dev/bauta/internal/advice"
)

// Backend is the half of the kernel that holds the rules: they don't see each other.
type Backend string

// The backends, by the names that the binaries have.
const (
	NFT    Backend = "nft"
	Legacy Backend = "legacy"
)

// other is the backend that is not in use.
func (b Backend) other() Backend {
	if b == NFT {
		return Legacy
	}
	return NFT
}

// Options are the same for all functions of the package; the zero value is usable.
type Options struct {
	Backend     Backend       // zero: detect as the distributions' wrappers do
	LockTimeout time.Duration // for the xtables lock; zero: 5 s
	RandomFully bool          // choose external ports at random even if the source port is free
	Log         *slog.Logger

	dirs    []string      // where binaries are looked for; nil: PATH and the usual places
	env     []string      // added to the environment of the binaries
	runTime time.Duration // zero: runTime

	readTime time.Duration // zero: readTime
}

const defaultLockTimeout = 5 * time.Second

var (
	// ErrNoBinary says that the node lacks the programs of this mode.
	ErrNoBinary = errors.New("not installed")
	// ErrNone says that nothing of ours is in this network namespace.
	ErrNone = errors.New("iptables: no rules of Bauta")
	// ErrPartly says that the policy is in force, but not for each family or device.
	ErrPartly = errors.New("rules not written for each family and device")
	// ErrLocked says that another program holds the xtables lock: try again later.
	ErrLocked = errors.New("xtables lock: held by another program")
)

// partly is an error about a family or devices, in its words; the rest is in force.
type partly struct{ error }

func (e partly) Is(target error) bool { return target == ErrPartly }
func (e partly) Unwrap() error        { return e.error }

// Error is an error with advice.
type Error = advice.Error
