package datapath

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
)

// A table that somebody removed does not make a data plane that goes on working none.
func TestInspectDamaged(t *testing.T) {
	topo := labtest.NewNode(t, lab.Options{})
	b := newBench(t, topo.Node, Options{})
	b.apply(nodePolicy(t, topo))
	b.close()
	remove := func(name string) error {
		t.Helper()
		if err := os.Remove(filepath.Join(b.opt.Root, name)); err != nil {
			t.Fatal(err)
		}
		in, err := Inspect(b.opt.Root)
		if err == nil {
			in.Close()
		}
		return err
	}
	if err := remove(pinStats); errors.Is(err, ErrNone) || err == nil || !strings.Contains(err.Error(), pinStats+": somebody removed it") || len(advice.Of(err)) != 2 {
		t.Errorf("without a table: %v", err)
	}
	if err := remove(pinControl); !errors.Is(err, ErrNone) {
		t.Errorf("while all are being removed: %v", err)
	}
}
