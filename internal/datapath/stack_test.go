package datapath

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// What the oldest supported kernel allows a chain of calls: frames, and bytes of stack, of which each
// frame takes a multiple of 32. Newer ones with a JIT compiler round to 16.
const (
	mostFrames = 8
	mostStack  = 512
	stackStep  = 32
)

// function is one of a program: its frame and whom it calls.
type function struct {
	stack int // bytes below the frame pointer
	calls []string
}

// frame is what the function takes of the stack.
func (f function) frame() int { return (max(f.stack, 1) + stackStep - 1) / stackStep * stackStep }

// functions reads the functions of a program from its instructions. A pointer into the frame is
// followed as the compiler makes it: copied from R10, moved by a constant.
func functions(instructions asm.Instructions) (all map[string]*function, first string) {
	all = make(map[string]*function)
	var f *function
	var pointers map[asm.Register]int // into the frame, by its offset
	for i := range instructions {
		ins := &instructions[i]
		if fn := btf.FuncMetadata(ins); fn != nil {
			f = &function{}
			pointers = map[asm.Register]int{asm.R10: 0}
			all[fn.Name] = f
			if first == "" {
				first = fn.Name
			}
		}
		reach := func(register asm.Register, by int) {
			if at, ok := pointers[register]; ok {
				f.stack = max(f.stack, -(at + by))
			}
		}
		if ins.IsFunctionCall() || ins.IsFunctionReference() { // what a helper calls back comes on top too
			f.calls = append(f.calls, ins.Reference())
		}
		switch class := ins.OpCode.Class(); {
		case class == asm.LdXClass:
			reach(ins.Src, int(ins.Offset))
			delete(pointers, ins.Dst)
		case class == asm.StClass || class == asm.StXClass:
			reach(ins.Dst, int(ins.Offset))
		case class == asm.LdClass:
			delete(pointers, ins.Dst)
		case ins.OpCode.ALUOp() == asm.Mov && class == asm.ALU64Class && ins.OpCode.Source() == asm.RegSource:
			if at, ok := pointers[ins.Src]; ok {
				pointers[ins.Dst] = at
			} else {
				delete(pointers, ins.Dst)
			}
		case ins.OpCode.ALUOp() == asm.Add && class == asm.ALU64Class && ins.OpCode.Source() == asm.ImmSource:
			if at, ok := pointers[ins.Dst]; ok {
				pointers[ins.Dst] = at + int(ins.Constant)
				reach(ins.Dst, 0)
			}
		case class.IsALU():
			delete(pointers, ins.Dst)
		}
	}
	return all, first
}

// deepest returns the chain of calls from a function on that takes the most stack, and the longest.
func deepest(all map[string]*function, name string) (chain []string, bytes, frames int) {
	f := all[name]
	for _, next := range f.calls {
		c, b, n := deepest(all, next)
		frames = max(frames, n)
		if b > bytes {
			chain, bytes = c, b
		}
	}
	return append([]string{fmt.Sprintf("%s %d", name, f.frame())}, chain...), bytes + f.frame(), frames + 1
}

// No chain of calls takes more stack than kernel 5.10 gives, by its own rule, which this machine's
// kernel does not have any more. The compiler may change any frame with any line.
func TestStack(t *testing.T) {
	t.Parallel()
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		all, first := functions(spec.Programs[name].Instructions)
		chain, bytes, frames := deepest(all, first)
		t.Logf("%s: %d bytes of %d, %d frames of %d, %d functions: %s", name, bytes, mostStack, frames, mostFrames, len(all), strings.Join(chain, " > "))
		if bytes > mostStack || frames > mostFrames {
			t.Errorf("%s takes %d bytes of stack in %d frames, kernel 5.10 allows %d in %d: %s", name, bytes, frames, mostStack, mostFrames, strings.Join(chain, " > "))
		}
	}
}

// The count itself: stores, a buffer whose address is passed on, two chains.
func TestStackCount(t *testing.T) {
	t.Parallel()
	start := func(name string, ins asm.Instruction) asm.Instruction {
		return btf.WithFuncMetadata(ins.WithSymbol(name), &btf.Func{Name: name, Type: &btf.FuncProto{Return: &btf.Int{Size: 4}}})
	}
	all, first := functions(asm.Instructions{
		start("main", asm.StoreMem(asm.R10, -40, asm.R1, asm.DWord)),
		asm.Mov.Reg(asm.R2, asm.R10),
		asm.Add.Imm(asm.R2, -300),
		asm.StoreMem(asm.R2, -1, asm.R1, asm.Byte), // 301
		asm.Mov.Imm(asm.R2, 0),
		asm.Add.Imm(asm.R2, -400), // no pointer any more
		asm.Call.Label("small"),
		asm.Call.Label("large"),
		asm.Return(),
		start("small", asm.LoadMem(asm.R1, asm.R1, -500, asm.Word)),
		asm.Return(),
		start("large", asm.StoreImm(asm.R10, -193, 0, asm.Byte)),
		asm.Call.Label("small"),
		asm.Return(),
	})
	chain, bytes, frames := deepest(all, first)
	if want := "main 320 > large 224 > small 32"; strings.Join(chain, " > ") != want || bytes != 576 || frames != 3 {
		t.Errorf("%d bytes in %d frames: %q, want %s", bytes, frames, chain, want)
	}
}
