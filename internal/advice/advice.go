// Package advice joins an error with what its reader may do about it. The command line prints
// "error: ERR", then "hint: HINT" lines.
package advice

import (
	"errors"
	"io/fs"
)

// Error is an error with remedies, a line each.
type Error struct {
	Err   error
	Hints []string
}

// New joins err with hints.
func New(err error, hints ...string) error { return &Error{Err: err, Hints: hints} }

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Of returns all advice in err and in what it wraps, the outermost first.
func Of(err error) []string {
	var hints []string
	if e, ok := err.(*Error); ok {
		hints = append(hints, e.Hints...)
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		hints = append(hints, Of(e.Unwrap())...)
	case interface{ Unwrap() []error }:
		for _, one := range e.Unwrap() {
			hints = append(hints, Of(one)...)
		}
	}
	return hints
}

// Bare is an error of a file without its path: for a message that has it already.
func Bare(err error) error {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err
	}
	return err
}
