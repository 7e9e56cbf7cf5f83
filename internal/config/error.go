package config

import "fmt"

// Error is a refused configuration. Msg names option, value and source; each
// hint says what to write instead. The command line prints "error: MSG", then
// "hint: HINT" lines.
type Error struct {
	Msg   string
	Hints []string
	Err   error // the cause, if there is one
}

func (e *Error) Error() string {
	if e.Err != nil {
		return e.Msg + ": " + e.Err.Error()
	}
	return e.Msg
}

func (e *Error) Unwrap() error { return e.Err }

// refuse returns the error for a value of s: what is wrong with it, and the remedies.
func (s setting) refuse(problem string, hints ...string) *Error {
	return &Error{Msg: fmt.Sprintf("%s %q (%s): %s", s.name, s.text(), s.source, problem), Hints: hints}
}

// refuseItem is refuse for one item of a list.
func (s setting) refuseItem(item, problem string, hints ...string) *Error {
	return &Error{Msg: fmt.Sprintf("%s %q (%s): %s", s.name, item, s.source, problem), Hints: hints}
}
