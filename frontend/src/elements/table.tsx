// Tables of records. Live tables share them, with their own cells.
import type { ComponentChildren } from "preact";
import { number } from "../format";
import { records, str, type Json, type JsonObject } from "../json";
import { Sideways } from "../sideways";
import { yesNo, type ElementProps } from "./element";

export interface Column {
  key: string;
  label: string;
  align: string;
  format: string;
}

export function columnsOf(value: Json | undefined): Column[] {
  return records(value).map((column) => ({
    key: str(column["key"]),
    label: str(column["label"]),
    align: str(column["align"]),
    format: str(column["format"]),
  }));
}

export function Table({ node }: ElementProps) {
  const props = node.props.value;
  return <DataTable columns={columnsOf(props["columns"])} rows={records(props["rows"])} cell={plainCell} />;
}

const plainCell = (value: Json | undefined): ComponentChildren =>
  typeof value === "number"
    ? number(value)
    : typeof value === "boolean"
      ? yesNo(value)
      : typeof value === "object" && value !== null
        ? JSON.stringify(value)
        : str(value, "–");

export function DataTable(props: {
  columns: Column[];
  rows: JsonObject[];
  cell: (value: Json | undefined, column: Column, row: JsonObject) => ComponentChildren;
  testid?: string;
  empty?: string;
}) {
  const { columns, rows } = props;
  const numeric = (column: Column): boolean =>
    column.align === "right" ||
    (column.align === "" && rows.length > 0 && rows.every((row) => typeof row[column.key] === "number"));
  if (rows.length === 0)
    return (
      <div class="empty small" data-testid={props.testid}>
        <p>{props.empty || "Nothing to show yet."}</p>
      </div>
    );
  return (
    <Sideways testid={props.testid}>
      <table>
        <thead>
          <tr>
            {columns.map((column) => (
              <th key={column.key} scope="col" class={numeric(column) ? "align-right" : ""}>
                {column.label}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map((row, i) => (
            <tr key={i}>
              {columns.map((column) => (
                <td key={column.key} class={numeric(column) ? "align-right tabular" : ""}>
                  {props.cell(row[column.key], column, row)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </Sideways>
  );
}
