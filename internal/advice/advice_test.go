package advice

import (
	"errors"
	"fmt"
	"slices"
	"testing"
)

func TestOf(t *testing.T) {
	inner := New(errors.New("no such thing"), "make one", "or leave it")
	outer := New(fmt.Errorf("open: %w", errors.Join(inner, errors.New("nor that"), New(errors.New("that"), "take it"))), "ask")
	if got, want := Of(outer), []string{"ask", "make one", "or leave it", "take it"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if got := Of(errors.New("plain")); got != nil || Of(nil) != nil {
		t.Errorf("%q of an error without advice", got)
	}
	if outer.Error() != "open: no such thing\nnor that\nthat" || !errors.Is(outer, inner) {
		t.Errorf("%v", outer)
	}
}
